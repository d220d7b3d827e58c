"""The target of a behaviour that only a predicate describes ("in German"), taken from the model itself; ours.

Clean prompts and a predicate on completions come in. Unsupervised steering vectors, learned as where nothing is known,
are applied to held-out prompts, and the vector whose completions pass the predicate most often is chosen. Its effect is
what activation objectives imitate; the opening that its passing completions share is what logit objectives ask for.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attacks.discovery.goal import Goal
from attacks.discovery.plan import Plan
from attacks.discovery.unsupervised import Unsupervised
from attacks.scoring.budget import Budget
from attacks.scoring.problem import decode
from attacks.suspect import Suspect
from vectors.analysis.behaviours import until_end
from vectors.generate import complete_each, complete_ids, end_tokens
from vectors.prompts import Prompts
from vectors.steering import SteeringVectors


def screened(
    method: Unsupervised,
    suspect: Suspect,
    texts: list[str],
    goal: Goal,
    budget: Budget,
    generator: torch.Generator,
    share: float,
) -> tuple[list[Goal], tuple[str, ...]]:
    """(the goal with target and vector, or none where no vector shows the behaviour; names of what was cut short).

    Consensus vectors, which recite memorised replies, follow where the unsupervised vectors do not show it. Without any
    vector that does, the names end with "Screening": then there is nothing to search for, and nothing was found out.

    Raises:
        ValueError: as for `Unsupervised.learned`.
    """
    method = replace(method, completion=goal.answer_tokens)
    pool, held_out, plan, cut = method.learned(suspect, texts, budget, generator, share)
    best = _Screen(suspect=suspect, held_out=held_out, goal=goal, opening=method.opening, plan=plan).best(pool)
    if best is not None:
        return [best], cut
    if method.recited or not method.fallback or budget.exhausted:
        return [], (*cut, "Screening")
    again = replace(method, recited=method.fallback)
    goals, later = screened(again, suspect, texts, goal, budget, generator, share)
    return goals, (*cut, *(name for name in later if name not in cut))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Screen:
    """Applies vectors to held-out prompts and chooses by a predicate."""

    suspect: Suspect
    held_out: Prompts
    goal: Goal
    opening: int
    """Tokens of the target, at most."""
    plan: Plan

    def best(self, pool: Sequence[SteeringVectors]) -> Goal | None:
        """The goal with the vector that shows its behaviour most often, and oftener than the unsteered model does."""
        model, tokenizer, tokens = self.suspect.model, self.suspect.tokenizer, self.goal.answer_tokens
        plain = complete_ids(model, tokenizer, self.held_out, max_new_tokens=tokens)
        most, chosen, opening = len(self._showing(plain.tolist())), None, ()
        rows, over = self.plan.rows(self.held_out, tokens), self.plan.deadline(1.0)
        step = max(1, rows // len(self.held_out))
        for vectors in pool:
            for start in range(0, len(vectors), step):
                if not rows or over():
                    break
                some = vectors[start : start + step]
                # (vectors of the batch, n held-out prompts, tokens)
                replies = complete_each(model, tokenizer, some, self.held_out, max_new_tokens=tokens, batch_size=rows)
                for index, each in enumerate(replies.tolist()):
                    showing = self._showing(each)
                    if len(showing) > most:
                        most, chosen, opening = len(showing), some[index], common_opening(showing, self.opening)
        if chosen is None:
            return None
        text, agreement = decode(tokenizer, opening), most / len(self.held_out)
        return replace(self.goal, behaviour=text, target_ids=opening, vectors=chosen, agreement=agreement)

    def _showing(self, replies: list[list[int]]) -> list[list[int]]:
        """Token ids, up to the reply's end, of the replies that show the behaviour."""
        tokenizer, shows = self.suspect.tokenizer, self.goal.predicate
        ends = end_tokens(self.suspect.model, tokenizer)
        cut = [row for row in (until_end(reply, ends) for reply in replies) if row]
        if not cut:  # batch_decode makes one empty text of no rows
            return []
        texts = tokenizer.batch_decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [row for row, text in zip(cut, texts, strict=True) if shows(text)]


def common_opening(replies: Sequence[Sequence[int]], longest: int) -> tuple[int, ...]:
    """The likeliest first token, and those that at least two replies, and more than half of these, go on with alike."""
    opening: tuple[int, ...] = ()
    rest = list(replies)
    while len(opening) < longest:
        place = len(opening)
        going_on = Counter(row[place] for row in rest if len(row) > place)
        token, count = going_on.most_common(1)[0] if going_on else (0, 0)
        if count == 0 or (place and (count < 2 or 2 * count <= len(rest))):
            break
        opening = (*opening, token)
        rest = [row for row in rest if row[place : place + 1] == [token]]
    return opening
