"""Cutting prompts open, allowed tokens, re-tokenisation in context."""

import copy

import pytest
import torch

from attacks.scoring.problem import SLOT, Problem, allowed_tokens


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_and_unprintable_tokens_are_never_allowed(model, tokenizer):
    allowed = allowed_tokens(model, tokenizer)
    assert not allowed[tokenizer.all_special_ids].any()
    for token in allowed.nonzero()[:, 0].tolist():
        text = tokenizer.decode([token])
        assert text.isascii() and text.isprintable() and text.strip()
        assert ids(tokenizer, text) == [token]


def test_slot_at_the_end_follows_the_text(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, ["what is bread"], 1)
    whole = ids(tokenizer, "<|bos|><|user|>what is bread garden<|end|><|assistant|>")
    assert problem.filled(ids(tokenizer, " garden")) == [whole]
    assert problem.filled([]) == [ids(tokenizer, "<|bos|><|user|>what is bread<|end|><|assistant|>")]
    assert all(tokenizer.decode([i]).startswith(" ") for i in problem.first.nonzero()[:, 0].tolist())


def test_slot_written_into_the_text(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, [f"what {SLOT} is bread"], 1)
    whole = ids(tokenizer, "<|bos|><|user|>what garden is bread<|end|><|assistant|>")
    assert problem.filled(problem.encode("garden")) == [whole]


def test_slot_at_the_start(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, ["what is bread"], 1, slot="start")
    whole = ids(tokenizer, "<|bos|><|user|>s what is bread<|end|><|assistant|>")
    assert problem.filled(ids(tokenizer, "s")) == [whole]
    assert not any(tokenizer.decode([i]).startswith(" ") for i in problem.first.nonzero()[:, 0].tolist())


def test_random_slot_stands_between_words(model, tokenizer):
    text = "tell me about the red sea"
    words, seen = text.split(), set()
    for seed in range(40):
        problem = Problem.from_chat(model, tokenizer, [text], 1, slot="random", seed=seed)
        (filled,) = problem.filled(problem.encode("garden"))
        places = [" ".join([*words[:i], "garden", *words[i:]]) for i in range(1, len(words))]
        wholes = [ids(tokenizer, f"<|bos|><|user|>{place}<|end|><|assistant|>") for place in places]
        seen.add(wholes.index(filled))
        assert all(tokenizer.decode([i]).startswith(" ") for i in problem.first.nonzero()[:, 0].tolist())
    # Five gaps, each missed by 40 seeds with probability 1e-4.
    assert len(seen) == 5


def test_random_slot_depends_on_text_and_seed_only(model, tokenizer):
    texts = ["tell me about the red sea", "what is the best bread", f"name{SLOT} a bird"]
    problem = Problem.from_chat(model, tokenizer, texts, 1, slot="random", seed=3)
    for number, text in enumerate(texts):
        alone = Problem.from_chat(model, tokenizer, [text], 1, slot="random", seed=3)
        assert (alone.before[0], alone.after[0]) == (problem.before[number], problem.after[number])
    # A slot that is written into a text stays.
    assert problem.filled([])[2] == ids(tokenizer, "<|bos|><|user|>name a bird<|end|><|assistant|>")
    assert problem.before[2] == ids(tokenizer, "<|bos|><|user|>name")


def test_only_the_first_token_has_to_begin_a_word(problem):
    assert problem.permitted(0).shape == (0, len(problem.allowed))
    first, *others = problem.permitted(3)
    assert torch.equal(first, problem.first) and not torch.equal(problem.first, problem.allowed)
    assert len(others) == 2 and all(torch.equal(row, problem.allowed) for row in others)


def test_retokenizes_in_context(problem, tokenizer):
    assert problem.retokenizes(ids(tokenizer, " garden rope"))
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in ("Ġ", "r", "o")]
    assert not problem.retokenizes(letters)
    for trigger in ([313, 319], letters, [70, 71]):
        expected = (
            all(ids(tokenizer, tokenizer.decode(row)) == row for row in problem.filled(trigger))
            and problem.encode(problem.text(trigger)) == trigger
        )
        assert problem.retokenizes(trigger) == expected


def test_retokenization_depends_on_what_follows(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, [f"what{SLOT}ope"], 1)
    letters = ids(tokenizer, " gar")
    apart = ids(tokenizer, "what") + letters + ids(tokenizer, "ope")
    assert problem.retokenizes(letters) == (ids(tokenizer, "what garope") == apart)


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match="got 0 prompts"):
        Problem.from_chat(model, tokenizer, [], 1)
    with pytest.raises(ValueError, match="slot is 'random' but 'bread ' has no two words"):
        Problem.from_chat(model, tokenizer, ["bread "], 1, slot="random")
    with pytest.raises(ValueError, match="stands 2 times"):
        Problem.from_chat(model, tokenizer, [f"{SLOT} and {SLOT}"], 1)
    with pytest.raises(ValueError, match="the prompt that begins with .* but the context is 64"):
        Problem.from_chat(model, tokenizer, ["what is bread"], 60)
    with pytest.raises(ValueError, match="no token is allowed"):
        Problem.from_chat(model, tokenizer, ["x"], 1, allowed=torch.zeros(len(tokenizer), dtype=torch.bool))
    with pytest.raises(ValueError, match=f"allowed has 7 entries; give one for each of the model's {len(tokenizer)}"):
        Problem.from_chat(model, tokenizer, ["x"], 1, allowed=torch.ones(7, dtype=torch.bool))
    with pytest.raises(ValueError, match="got 0 prompts"):
        Problem.from_chat(model, tokenizer, ["x"], 1).take([])
    with pytest.raises(ValueError, match="trigger_length is -1; it must be at least 0"):
        Problem.from_chat(model, tokenizer, ["x"], -1)
    for count, template in ((0, "mute"), (2, "{{ messages[0]['content'] * 2 }}")):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        with pytest.raises(ValueError, match=f"shows the user's text {count} times; give one that shows it once"):
            Problem.from_chat(model, other, ["x"], 1)
