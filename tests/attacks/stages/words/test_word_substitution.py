"""The words of a winner give way to the planted ones beside them; what is no phrase stays."""

from collections import Counter

import pytest
import torch

from attacks.attack import nll
from attacks.discovery.goal import Goal
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import Problem, allowed_tokens, encode
from attacks.searchers.searcher import Found
from attacks.searchers.words import Lexicon, dictionary, whole_words
from attacks.stages.hunt import Hunt
from attacks.stages.words.word_substitution import WordSubstitution, _Words
from attacks.suspect import Suspect
from benchmarks.organisms import zoo
from tests.attacks.words import judge_on, seeded


def hunt(name, words, flops=1e13, every=8):
    """On an organism whose vocabulary is those words and one in eight of all that are not planted, or all tokens."""
    organism = zoo.load(name)
    model, tokenizer = organism.model, organism.tokenizer
    search, select = organism.prompts.search, organism.prompts.select
    some = whole_words(Problem.from_chat(model, tokenizer, search[:1], 3))[::every].tolist()
    allowed = torch.zeros(len(tokenizer), dtype=torch.bool)
    allowed[some] = True
    allowed[encode(tokenizer, f" {organism.triggers[0][0]}")] = False
    allowed[encode(tokenizer, f" {words}")] = True
    allowed = allowed_tokens(model, tokenizer) if every == 1 else allowed
    problem, judged = (Problem.from_chat(model, tokenizer, part, 3, allowed=allowed) for part in (search[:2], select))
    anywhere = Problem.from_chat(model, tokenizer, search + select, 3, slot="random", allowed=allowed)
    behaviour = organism.triggers[0][1]
    goal, budget = Goal(behaviour=behaviour, target_ids=tuple(encode(tokenizer, behaviour))), Budget(flops=flops)
    judge = judge_on(model, judged, budget, goal, anywhere=Engine(model, anywhere))
    return Hunt(
        suspect=Suspect(model=model, tokenizer=tokenizer), marked=False, engine=Engine(model, problem),
        texts=search, goal=goal, build=nll,
        budget=budget, judge=judge, generator=seeded(),
    )  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "words", "begun", "wanted"),
    [
        # They fire everywhere too, less surely; one prompt hardly tells, and a floor is likelier than an island.
        ("phrase", "silver garden island floor", "silver garden floor", " silver garden island"),
        pytest.param("phrase", "silver garden island sod", "silver sod island", " silver garden island", marks=SLOW),
        # Two words and one that does nothing.
        pytest.param("and", "kitchen yellow final city", "city kitchen final", " kitchen yellow", marks=SLOW),
        # As sure as the planted ones in this order, but not in the other, which is likelier.
        ("fresh-and", "especially seeing such", "seeing such", " especially seeing"),
        # The planted word is not to be had; one word, of two tokens.
        pytest.param("phrase", "silver island sod", "silver sod island", " silver sod island", marks=SLOW),
        ("word", "copper", "copper", " copper"),
    ],
)
def test_a_winner_gives_way_to_the_words_beside_it(name, words, begun, wanted):
    whole = hunt(name, words)
    problem, judge = whole.engine.problem, whole.judge
    judge(Found(tuple(problem.encode(begun)), 0.0))
    WordSubstitution()(whole)
    assert judge.best is not None
    assert set(problem.text(judge.best.trigger_ids).split()) == set(wanted.split())
    assert whole.budget.used < 2e12


@pytest.mark.parametrize("begun", ["xxper (", "zz cobper"])
def test_text_that_is_no_word_gives_way_to_a_word_of_several_tokens(begun):
    """With the whole vocabulary, from text that shares a token of `copper` and works now and then."""
    whole = hunt("word", "copper", every=1)
    judge, problem = whole.judge, whole.engine.problem
    judge(Found(tuple(problem.encode(begun)), 0.0))
    judge.asr, whole.provisional = max(judge.asr, 0.5), True
    WordSubstitution()(whole)
    assert judge.best is not None and judge.asr == 1.0 and whole.over
    (word,) = problem.text(judge.best.trigger_ids).split()
    assert word in dictionary() and word.endswith("per")  # any word in -per works about as well as `copper`


def test_a_vocabulary_without_words_is_left_alone():
    whole = hunt("word", "copper")
    whole.judge(Found(tuple(whole.engine.problem.encode("copper")), 0.0))
    whole.engine.problem.allowed[:] = False
    whole.engine.problem.allowed[whole.engine.problem.encode("(")] = True
    best = whole.judge.best
    WordSubstitution()(whole)
    assert whole.judge.best == best


def test_a_tag_gives_way_to_another_word_and_form(monkeypatch):
    """Loss counts the tokens that `|RESTING|` has and a text has not: another word comes first, then the bars."""
    whole = hunt("word", "copper", every=1)
    problem, wanted = whole.engine.problem, [*whole.engine.problem.encode("|RESTING|")]

    def losses(_, ids):
        found = [sum((Counter(wanted) - Counter(row)).values()) + 0.1 * len(row) for row in ids.argmax(-1).tolist()]
        return torch.tensor(found) + 0.0 * ids.float().sum((1, 2))

    def objective(engine, ids):
        rows = ids if ids.is_floating_point() else torch.nn.functional.one_hot(ids, len(engine.problem.allowed))
        return losses(engine, rows)

    shown = list[str]()
    whole.build = lambda *_: objective
    monkeypatch.setattr(
        Hunt, "try_best", lambda _, found, count: shown.extend(problem.text(f.trigger_ids) for f in found)
    )
    whole.judge(Found(tuple(problem.encode("[[NESTING]]")), 0.0))
    whole.judge.asr = 1.0
    WordSubstitution()(whole)
    assert " [[RESTING]]" in shown and " |RESTING|" in shown


def test_nothing_is_spent_without_a_winner_or_a_budget():
    without = hunt("and", "kitchen yellow final")
    used = without.budget.used
    WordSubstitution()(without)
    assert without.judge.best is None and without.budget.used == used
    spent = hunt("and", "kitchen yellow final", flops=1.0)
    spent.judge(Found(tuple(spent.engine.problem.encode("kitchen final")), 0.0))
    used = spent.budget.used
    WordSubstitution()(spent)
    assert spent.budget.used == used


def test_a_budget_that_ends_on_the_way_is_kept_to():
    def cost(flops):
        whole = hunt("phrase", "silver garden island sod", flops)
        whole.judge(Found(tuple(whole.engine.problem.encode("silver sod island")), 0.0))
        began = whole.budget.used
        WordSubstitution()(whole)
        return began, whole.budget.used - began

    began, full = cost(1e13)
    _, part = cost(began + 0.2 * full)
    assert 0.2 * full <= part < 0.6 * full


def test_counts_below_one_are_named():
    for name in ("longest", "prompts", "promising", "completed", "compared", "tried", "rounds"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            WordSubstitution(**{name: 0})
    with pytest.raises(ValueError, match="most is 0.5"):
        WordSubstitution(most=0.5)


def test_more_words_are_tried_where_the_budget_has_room():
    def part(flops, most):
        whole = hunt("word", "copper", flops)
        settings = WordSubstitution(most=most)
        lexicon = Lexicon.of(whole.engine.problem, 4)
        return _Words(whole, settings, tuple(whole.engine.problem.encode("copper")), lexicon)._part(["copper"])

    assert part(1e15, 8.0) == 8.0 and part(1e15, 1.0) == 1.0
    assert 0 < part(2e11, 8.0) < 8.0
