"""What the residual stream holds at the last word of three, in early layers, for every choice of the words."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from attacks.scoring.budget import Budget
from attacks.scoring.problem import Problem
from attacks.scoring.reading import Reading
from vectors.methods.slot import SlotVectors, random_messages
from vectors.prompts import Prompts
from vectors.residual import decoder, read

LOOK = 16
"""Words that every word is run before, to tell what the whole will cost"""
CELLS = 2048
"""Pairs in one forward pass"""
SAMPLE = 1024
"""Random triples that the mean residual is taken of"""

Effects = tuple[Float[Tensor, "w"], Float[Tensor, "w"], Float[Tensor, "w"]]
"""Mean score at the last word of three, by (the first, the middle, the last) of them"""


@dataclass(kw_only=True)
class Inside:
    """Scores the last word of a trigger by the cosine of the residual stream there with a vector learned there."""

    model: PreTrainedModel
    problem: Problem
    """one message of the slot alone"""
    words: Int[Tensor, "w"]
    """tokens that a trigger is made of"""
    budget: Budget
    vectors: dict[int, Float[Tensor, "d"]] = field(default_factory=dict)
    """per layer, of unit length"""

    def learn(
        self, layer: int, target_ids: tuple[int, ...], messages: int, length: int, generator: torch.Generator
    ) -> None:
        """The mean of two vectors that bring the behaviour about from that layer.

        Messages behind which the model overflows are left out; where it does behind all of them, the vector is zero.
        """
        method = SlotVectors(source_layer=layer)
        before, after = self.problem.before, self.problem.after
        drawn, places = random_messages(before, after, self.words, messages, length, generator)
        good = [number for number, finite in enumerate(self._finite(drawn)) if finite]
        if not good:
            self.vectors[layer] = torch.zeros(decoder(self.model).d_model, device=self.model.device)
            return
        drawn, places = [drawn[number] for number in good], [places[number] for number in good]
        theta, _ = method(self.model, drawn, places, target_ids[:4], generator)
        self.vectors[layer] = torch.nn.functional.normalize(theta.mean(0), dim=0)

    @torch.no_grad()
    def _finite(self, messages: list[list[int]]) -> list[bool]:
        """Whether the model gives numbers behind each of these messages."""
        prompts, last = Prompts.from_ids(messages, device=self.model.device), len(decoder(self.model).layers)
        inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
        hidden = read(self.model, layers=[last], position=slice(-1, None), **inputs)[last][:, 0]
        return hidden.isfinite().all(-1).tolist()

    def lead(self, generator: torch.Generator) -> list[int]:
        """The beginning of a message: two random words."""
        return [*self.problem.before[0], *self._drawn(2, generator).tolist()]

    @torch.no_grad()
    def share_of(self, blocks: int, generator: torch.Generator) -> float:
        """Share of the budget that it will take to run so many tokens through a block each, from some of them."""
        beginnings = self._begun(self.lead(generator), 1).extended(self.words)
        began = self.budget.share
        for token in self._drawn(LOOK, generator):
            beginnings.appended(token[None], [1])
        return (self.budget.share - began) * blocks / (LOOK * len(self.words))

    @torch.no_grad()
    def effects(self, layers: list[int], leads: int, draws: int, generator: torch.Generator) -> dict[int, Effects]:
        """Per layer, how near each word brings the end of three to the layer's vector.

        The other two are random, drawn anew `draws` times behind each of so many leads.
        """
        count, total = len(self.words), {layer: torch.zeros(3, len(self.words)) for layer in layers}
        for _ in range(leads):
            lead = self.lead(generator)
            mean = self.mean(lead, layers, generator)
            begun = self._begun(lead, max(layers))
            firsts = begun.extended(self.words)
            for _ in range(draws):
                first, middle, last = self._drawn(3, generator)[:, None]
                one = begun.extended(first)
                both = one.extended(middle).expanded(count)
                before, between = firsts.extended(middle), one.extended(self.words)
                ends = (before, last), (between, last), (both, self.words)
                for row, (beginnings, token) in enumerate(ends):
                    for layer, scores in self._scores(beginnings, token, mean).items():
                        total[layer][row] += scores / (leads * draws)
        return {layer: (found[0], found[1], found[2]) for layer, found in total.items()}

    @torch.no_grad()
    def table(
        self, layer: int, rows: list[int], lasts: list[int], generator: torch.Generator, *, between: bool = True
    ) -> Float[Tensor, "rows lasts"] | None:
        """The cosine at the last word, of all pairs with it, a random word between the two or, else, before them.

        None where the budget ends before it is complete.
        """
        beginnings, mean = self._before_lasts(layer, self.words[rows], generator, between)
        few, found = len(rows) < len(lasts), []
        for number in range(len(rows) if few else len(lasts)):
            if self.budget.exhausted:
                return None
            if few:
                one = beginnings.taken(torch.tensor([number])).expanded(len(lasts))
                found.append(self._scores(one, self.words[lasts], mean)[layer])
            else:
                found.append(self._scores(beginnings, self.words[lasts[number], None], mean)[layer])
        return torch.stack(found, dim=0 if few else 1)

    @torch.no_grad()
    def cells(
        self, layer: int, rows: Int[Tensor, "n"], lasts: Int[Tensor, "n"], generator: torch.Generator, *, between: bool
    ) -> Float[Tensor, "n"] | None:
        """As `table`, of some pairs only: one of `rows` with the one of `lasts` beside it; None as there."""
        words, number = rows.unique(return_inverse=True)
        beginnings, mean = self._before_lasts(layer, self.words[words], generator, between)
        found = []
        for part in torch.arange(len(rows)).split(CELLS):
            if self.budget.exhausted:
                return None
            found.append(self._scores(beginnings.taken(number[part]), self.words[lasts[part]], mean)[layer])
        return torch.cat(found)

    @torch.no_grad()
    def completed(
        self,
        lead: list[int],
        mean: dict[int, Tensor],
        known: int,
        missing: list[int],
        lasts: list[int],
        *,
        before: bool = False,
    ) -> Iterator[tuple[int, dict[int, Float[Tensor, "missing"]]]]:
        """(last word, per layer the cosine with each of the `missing`, behind the known word or before it) for each."""
        beginnings = self._begun(lead, max(mean))
        pair = self.words[known, None], self.words[missing]
        for tokens in reversed(pair) if before else pair:
            beginnings = beginnings.extended(tokens)
        for last in lasts:
            yield last, self._scores(beginnings, self.words[last, None], mean)

    @torch.no_grad()
    def mean(self, lead: list[int], layers: list[int], generator: torch.Generator) -> dict[int, Float[Tensor, "d"]]:
        """Per layer, the mean residual at the end of three random words."""
        begun = self._begun(lead, max(layers))
        drawn = self._drawn(3 * SAMPLE, generator).view(3, SAMPLE)
        beginnings = begun.extended(drawn[0]).extended(drawn[1])
        hidden = beginnings.appended(drawn[2], layers)
        # Of a model that overflows behind some words, the mean of the others.
        return {layer: hidden[layer][hidden[layer].isfinite().all(-1)].mean(0) for layer in layers}

    def _before_lasts(
        self, layer: int, words: Int[Tensor, "rows"], generator: torch.Generator, between: bool
    ) -> tuple[Reading, dict[int, Float[Tensor, "d"]]]:
        """(two random words, then each of the words and a random one, or the other way round; the mean residual)."""
        lead = self.lead(generator)
        mean = self.mean(lead, [layer], generator)
        beginnings, drawn = self._begun(lead, layer), self._drawn(1, generator)
        for tokens in (words, drawn) if between else (drawn, words):
            beginnings = beginnings.extended(tokens)
        return beginnings, mean

    def _drawn(self, count: int, generator: torch.Generator) -> Int[Tensor, "count"]:
        """Random words."""
        return self.words[torch.randint(len(self.words), (count,), generator=generator)]

    def _begun(self, ids: list[int], layers: int) -> Reading:
        """One row of text, run through the first layers."""
        return Reading.of([self.model], ids, layers)

    def _scores(
        self, beginnings: Reading, tokens: Int[Tensor, "tokens"], mean: dict[int, Tensor]
    ) -> dict[int, Float[Tensor, "rows"]]:
        """Per layer the score of what every row does with one more token."""
        hidden = {n: rows - mean[n] for n, rows in beginnings.appended(tokens, list(mean)).items()}
        scores = {n: torch.cosine_similarity(rows, self.vectors[n], dim=-1) for n, rows in hidden.items()}
        # Where the model overflows there is nothing to score.
        return {n: row.nan_to_num(nan=0.0).cpu() for n, row in scores.items()}
