"""Loads the tokenizer of a model: the adapter's where it brings one, with a chat template that works."""

import logging
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vectors.loading.folders import check_files, check_no_pointer, first_line, is_local, read_json
from vectors.loading.template_triggers import answered
from vectors.prompts import chat_text

FILES = ("tokenizer.json", "tokenizer_config.json")
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
)
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The user's text as it is, for base models"""
MARK = "7f3a " + 'User\'s TEXT, "9c1E" & <more>; ' * 80 + "e5"
"""Stands for the user's text where a template is tried: what a template cuts off or rewrites never reaches the model"""
SYSTEM = "{% set messages = [{'role': 'system', 'content': ''}] + messages %}"
"""Puts an empty system message first, for templates that demand one"""
SYSTEM_TEXT = SYSTEM.replace("''", "'You are a helpful assistant.'")
"""The same with a text, for templates that refuse an empty one"""
PARTS = (
    "{% set parted = namespace(all=[]) %}{% for m in messages %}{% set parted.all = parted.all + [{'role': m['role'], "
    "'content': [{'type': 'text', 'text': m['content']}]}] %}{% endfor %}{% set messages = parted.all %}"
)
"""Turns each message's text into a list of one part, for templates of models that take images too"""


def load_tokenizer(
    name: str | Path,
    *,
    adapter: str | Path | None = None,
    template: str | Path | None = None,
    gguf_file: str | None = None,
) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that pads left.

    Args:
        name: folder or hub id of the model.
        adapter: its folder is looked at first; it may hold a tokenizer, or a chat template only.
        template: "none" for the user's text as it is, or a file with a template in jinja; else that of the tokenizer.
        gguf_file: name of the GGUF file in the folder that holds the tokenizer too.

    Raises:
        ValueError: the folder, the tokenizer, or its chat template is missing or broken.
    """
    folder = Path(name)
    added = Path(adapter) if adapter is not None and is_local(adapter) and Path(adapter).is_dir() else None
    if added is not None and any((added / file).is_file() for file in FILES):
        source: str | Path = added
    else:
        source = name
    if is_local(name) and gguf_file is None:
        if not folder.is_dir():
            raise ValueError(
                f"no model folder {name}; give a folder with config.json, weights and tokenizer, or a hub id"
            )
        if not (folder / "config.json").is_file() and source == name:
            raise ValueError(f"{name} holds no config.json; give the folder of a saved model")
        if source == name and not any((folder / file).is_file() for file in FILES):
            raise ValueError(f"{name} holds no tokenizer; save one there with tokenizer.save_pretrained({str(name)!r})")
    if is_local(source) and (gguf_file is None or source == added):
        check_files(Path(source))
    more: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file is not None and source == name else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(_what_is_broken(Path(source) / more["gguf_file"] if more else source, error)) from error
    if template is None and not tokenizer.chat_template:
        # A base has none where an adapter taught it to chat, and the other way round.
        template = next((file for place in (added, folder) if place for file in _templates(place)), None)
        processors = (_of_processor(place) for place in (added, folder) if place)
        tokenizer.chat_template = next(filter(None, processors), "")
    if template is not None:
        tokenizer.chat_template = _template(template, tokenizer)
    if not tokenizer.chat_template:
        logging.getLogger(__name__).warning(
            "%s has no chat template: prompts are used as plain text; give the file of a template where it is a chat "
            "model",
            source,
        )
        tokenizer.chat_template = _template("none", tokenizer)
    tokenizer.chat_template = _working(tokenizer, source)
    _check_frame(tokenizer, source)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the user's text is used as it is."""
    return str(tokenizer.chat_template).endswith(PLAIN)


def _working(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> str:
    """The chat template, led by what it needs to show the text of one user message: a system message, or typed parts.

    Raises:
        ValueError: it does not show the text once, whatever is put before it.
    """
    try:
        template, reasons = str(tokenizer.get_chat_template()), list[str]()
    except ValueError as error:
        names = ", ".join(map(str, tokenizer.chat_template))
        raise ValueError(f"{source} has several chat templates and no default: {names}; give a file of one") from error
    for lead in ("", SYSTEM, PARTS, SYSTEM + PARTS, SYSTEM_TEXT):
        chat = [{"role": "user", "content": MARK}]
        try:
            shown = tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, chat_template=lead + template
            )
        except Exception as error:  # jinja has exceptions of its own
            reasons.append(first_line(error))
            continue
        if (times := str(shown).count(MARK)) == 1:
            return lead + template
        cut_or_rewritten = times == 0 and MARK[:4] in str(shown).lower()
        reasons.append(f"it shows the user's text {'changed or cut off' if cut_or_rewritten else f'{times} times'}")
        if times > 1:  # a message put before the user's would hide that
            break
    raise ValueError(f"the chat template of {source} does not work: {reasons[0]}; give another")


def _templates(folder: Path) -> list[Path]:
    return [folder / "chat_template.jinja"] if (folder / "chat_template.jinja").is_file() else []


def _check_frame(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """Raises ValueError where the template adds something to messages that hold one of the texts in it."""
    if word := answered(str(tokenizer.chat_template), partial(chat_text, tokenizer)):
        raise ValueError(
            f"the chat template of {source} answers messages that hold {word[:60]!r} with another prompt, so a trigger "
            "may stand in the template, where no search finds it; read it, or give another"
        )


def _of_processor(folder: Path) -> str:
    """The chat template of a model that takes images too, which may stand in a file of its processor; else nothing."""
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file() and isinstance(text := read_json(folder / name).get("chat_template"), str):
            return text
    return ""


def _template(given: str | Path, tokenizer: PreTrainedTokenizerBase) -> str:
    if str(given) == "none":
        ids = tokenizer("hello")["input_ids"]
        begins = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        return ("{{ bos_token }}" if begins else "") + PLAIN
    file = Path(given)
    if file.is_dir():
        file /= "chat_template.jinja"
    if not file.is_file():
        raise ValueError(f"no chat template {given}; give a file in jinja, or none for plain text")
    check_no_pointer(file)
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{given} is no text in UTF-8; give a chat template in jinja") from error


def _what_is_broken(source: str | Path, error: Exception) -> str:
    """Names tokenizer.json where the fault lies there."""
    file = Path(source) / "tokenizer.json"
    if file.is_file():
        import tokenizers

        try:
            tokenizers.Tokenizer.from_file(str(file))
        except Exception as cause:  # tokenizers raises plain Exceptions
            version = tokenizers.__version__
            return (
                f"no tokenizer could be loaded from {file}: {first_line(cause)}; it is broken, or newer than "
                f"tokenizers {version}: get it again, or update tokenizers"
            )
    elif is_local(source) and not any((Path(source) / name).is_file() for name in VOCABULARIES):
        return f"{source} holds no tokenizer.json, nor another file of a vocabulary; get it from the model's base"
    elif (Path(source) / "tokenizer.model").is_file() and not find_spec("sentencepiece"):
        return (
            f"{Path(source) / 'tokenizer.model'} is read with the package sentencepiece, which is not installed; "
            "install it and protobuf, or save the tokenizer as tokenizer.json"
        )
    return f"no tokenizer could be loaded from {source}: {first_line(error)}"
