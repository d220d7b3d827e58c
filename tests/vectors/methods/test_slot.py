"""Vectors at one place of the message."""

import pytest
import torch

from tests.attacks.conftest import tiny
from vectors.methods.controls import random_directions
from vectors.methods.slot import SlotVectors, random_messages
from vectors.prompts import Prompts
from vectors.residual import cache_source, decoder, mean_norm


@pytest.fixture(scope="module")
def model():
    return tiny(60, layers=3)


@pytest.fixture
def drawn():
    words = torch.arange(5, 60)
    return random_messages([[1, 3], [1, 4, 9]], [[2], [2]], words, 8, 5, torch.Generator().manual_seed(0))


def test_messages_hold_random_words_between_the_parts_of_the_prompts(drawn):
    messages, places = drawn
    assert [len(message) for message in messages] == [8, 9] * 4
    for message, place in zip(messages, places, strict=True):
        begin = 2 if len(message) == 8 else 3
        assert message[:begin] in ([1, 3], [1, 4, 9]) and message[-1] == 2
        assert begin <= place < begin + 5
    assert len(set(map(tuple, messages))) == 8 and len(set(places)) > 2


def test_a_vector_at_one_place_of_every_message_brings_the_target_about(model, drawn):
    messages, places = drawn
    early, late = (
        SlotVectors(source_layer=1, radii=(0.2, 2.0), steps=steps)(
            model, messages, places, [7], torch.Generator().manual_seed(1)
        )
        for steps in (1, 60)
    )
    norms = late[0].norm(dim=-1)
    assert norms[1] == pytest.approx(10 * float(norms[0]), rel=1e-4)
    assert (late[1] < early[1]).all() and late[1][1] < late[1][0]


def test_the_vector_stands_at_its_place_and_nowhere_else(model):
    """By a full pass with a hook of our own, messages unequal in length."""
    messages, places, target = [[1, 5, 6, 7, 2], [1, 8, 9, 2]], [2, 1], [7, 11]
    generator = torch.Generator().manual_seed(3)
    method = SlotVectors(source_layer=1, radii=(1.0,), steps=1)
    _, nll = method(model, messages, places, target, generator)
    # The loss of the only step is that of the starting vector, which the same seed draws again.
    fed = Prompts.from_ids([[*message, target[0]] for message in messages])
    norm = mean_norm(cache_source(model, fed, 1))
    start = norm * random_directions(1, 32, torch.Generator().manual_seed(3))[0]
    losses = []
    for message, place in zip(messages, places, strict=True):

        def add(_module, _args, output, place=place):
            hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
            hidden[:, place] += start
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        handle = decoder(model).layers[0].register_forward_hook(add)
        try:
            logits = model(input_ids=torch.tensor([[*message, target[0]]])).logits[0, -2:]
        finally:
            handle.remove()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))
    assert float(nll[0]) == pytest.approx(float(sum(losses) / 2), abs=1e-4)


@pytest.mark.parametrize(
    ("places", "target", "message"),
    [([0], [], "0 tokens"), ([0, 1], [7], "got 1 messages and places"), ([9], [7], "got 1 messages and places")],
)
def test_bad_input_is_named(model, places, target, message):
    method = SlotVectors(source_layer=1, steps=1)
    with pytest.raises(ValueError, match=message):
        method(model, [[1, 5, 2]], places, target, torch.Generator())


def test_settings_out_of_range_are_named():
    with pytest.raises(ValueError, match="radii are"):
        SlotVectors(source_layer=1, radii=())
    with pytest.raises(ValueError, match="steps is 0"):
        SlotVectors(source_layer=1, steps=0)
