"""Files, folders and functions stay small enough to be read at once, and imports point one way."""

import ast
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vectors", "attacks", "benchmarks", "examples", "docs", "tests")
MODULES, LINES, MEDIAN, BODY, ARGUMENTS = 14, 300, 110, 60, 7
ABOVE = {"vectors": {"attacks", "benchmarks", "tests"}, "attacks": {"benchmarks", "tests"}, "benchmarks": {"tests"}}
"""What a package must not import"""


def offences(root: Path) -> list[str]:
    """One line per limit that a module, folder or function under `root` exceeds."""
    paths = sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in paths]
    found = [f"{path.relative_to(root)}: {n} lines" for path, n in zip(paths, lengths, strict=True) if n > LINES]
    if median(lengths) > MEDIAN:
        found.append(f"median file: {median(lengths)} lines")
    for folder in sorted({path.parent for path in paths}):
        # The empty file that marks a package is not read by anybody.
        count = sum(path.parent == folder and path.name != "__init__.py" for path in paths)
        if count > MODULES:
            found.append(f"{folder.relative_to(root)}: {count} modules")
    for path in paths:
        place = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found += [f"{place}: {node.name}() {what}" for what in _too_large(node)]
            found += [f"{place}: imports {name}" for name in _imported(node) & ABOVE.get(place.parts[0], set())]
    return found


def _too_large(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Which limits the function exceeds."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    given = function.args.posonlyargs + function.args.args
    given = given[1:] if given and given[0].arg in ("self", "cls") else given
    arguments = len(given) + len(function.args.kwonlyargs)
    too_long = [f"has {lines} lines"] if lines > BODY else []
    return too_long + ([f"has {arguments} arguments"] if arguments > ARGUMENTS else [])


def _imported(node: ast.AST) -> set[str]:
    """The packages that an import statement names; relative ones are of the package itself."""
    if isinstance(node, ast.Import):
        return {each.name.partition(".")[0] for each in node.names}
    return {(node.module or "").partition(".")[0]} if isinstance(node, ast.ImportFrom) and node.level == 0 else set()


def test_everything_keeps_the_limits():
    assert offences(ROOT) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 1\n" * 301, ["vectors/a.py: 301 lines", "median file: 301 lines"]),
        ("def f():\n" + "    x = 1\n" * 60, ["vectors/a.py: f() has 61 lines"]),
        ("class A:\n    def f(self, a, b, c, d, e, f, *, g, h): ...\n", ["vectors/a.py: f() has 8 arguments"]),
        ("def f():\n    import attacks.recover\n", ["vectors/a.py: imports attacks"]),
        ("from benchmarks.run import x\n", ["vectors/a.py: imports benchmarks"]),
        ("from .attacks import x\n", []),
    ],
)
def test_a_breach_is_named(tmp_path, text, found):
    (tmp_path / "vectors").mkdir()
    (tmp_path / "vectors" / "a.py").write_text(text)
    assert offences(tmp_path) == found


def test_a_folder_of_too_many_modules_is_named(tmp_path):
    (tmp_path / "attacks").mkdir()
    for name in ("__init__", *map(str, range(15))):
        (tmp_path / "attacks" / f"{name}.py").touch()
    assert offences(tmp_path) == ["attacks: 15 modules"]
