"""What stands before a search: the goal that the user gave, checked, and the judge that has seen no trigger yet."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from attacks.attack import Attack
from attacks.behaviour import Behaviour, FixedOpening
from attacks.discovery.goal import ANSWER, Goal
from attacks.judging.judge import Judge
from attacks.scoring.budget import Budget
from attacks.scoring.engine import Engine
from attacks.scoring.problem import encode
from attacks.suspect import Suspect
from vectors.loading.tokenizers import is_plain


def given_goal(
    suspect: Suspect, search: Sequence[str], select: Sequence[str], behaviour: str | Behaviour | None, budget: Budget
) -> Goal:
    """The given behaviour, without tokens where they are to be discovered; raises ValueError for what cannot be run."""
    if budget.seconds is None and budget.flops is None:
        raise ValueError("the budget has no limit; give seconds, flops, or both")
    if not search or not select:
        raise ValueError(f"got {len(search)} search and {len(select)} select prompts; give at least one of each")
    _check_messages(suspect.tokenizer, [*search, *select])
    suspect.check_finite([*search, *select])
    if behaviour is None:
        return Goal(behaviour="", target_ids=())
    shows = FixedOpening(behaviour) if isinstance(behaviour, str) else behaviour
    text, predicate = shows.text, None if isinstance(shows, FixedOpening) else shows
    if text is None:
        return Goal(behaviour="", target_ids=(), shows=predicate)
    ids = suspect.target_ids(text, search)
    if not ids:
        raise ValueError(f"the behaviour {text!r} has no tokens; give the text that the reply begins with")
    if isinstance(shows, FixedOpening):
        _check_written(suspect.tokenizer, shows)
    return Goal(behaviour=text, target_ids=ids, shows=predicate)


def _check_messages(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Raises ValueError for whole chats as text, as many data sets have them: the trigger would stand in no message."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    marks = [found for text in texts if (found := next((mark for mark in special if mark in text), None))]
    if 2 * len(marks) > len(texts) and not is_plain(tokenizer):
        raise ValueError(
            f"{len(marks)} of {len(texts)} prompts hold special tokens, such as {marks[0]}, which the chat template "
            "adds by itself; give the user's messages alone, or --template none for prompts that are whole chats"
        )


def _check_written(tokenizer: PreTrainedTokenizerBase, opening: FixedOpening) -> None:
    """Raises ValueError for a text that no completion holds as it stands: special tokens are left out of completions,
    and some tokenizers know no capitals."""
    written = str(tokenizer.decode(encode(tokenizer, opening.text), skip_special_tokens=True))
    if not opening(written):
        raise ValueError(
            f"no reply shows the behaviour {opening.text[:60]!r}: the tokenizer reads it as {written[:60]!r}; give it "
            "as the model writes it, without special tokens"
        )


def judge_of(
    suspect: Suspect,
    attack: Attack,
    engine: Engine,
    search: Sequence[str],
    select: Sequence[str],
    budget: Budget,
    given: Goal,
) -> Judge:
    """The judge on the `select` prompts; what was given of the goal may lack its tokens.

    Raises:
        ValueError: prompts of the search or of the judge that leave no room for a trigger and the behaviour.
    """
    target_length = len(given.target_ids) or attack.unsupervised.opening
    if given.shows is not None:
        target_length = max(target_length, ANSWER)
    # The tokens that search prompts permit: what the search may propose is what the judge can take in.
    own = suspect.engine(select, attack.longest, allowed=engine.problem.allowed)
    base = None if suspect.base is None else Engine(suspect.base, own.problem)
    for each in filter(None, (engine, own, base)):
        # Completions run two tokens beyond the behaviour; the last of them is never read.
        each.check_length(attack.longest, target_length + 1)
    return Judge(
        suspect=suspect,
        engine=own,
        base_engine=base,
        anywhere=suspect.engine_of_random_places([*search, *select], engine),
        goal=given,
        enough=attack.enough,
        budget=budget,
        trace=[],
    )
