"""Rules that learn vectors at several radii and choose the radius by what the model writes under them.

Chosen is the cusp of the completions' diversity (Mack & Turner 2024, MELBO), or the radius whose completions a judge,
any function from texts to scores, likes best.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from kneed import KneeLocator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vectors.analysis.behaviours import until_end
from vectors.generate import complete_each, end_tokens
from vectors.prompts import Prompts
from vectors.radius.rule import Progress, RadiusChoice, check_radii
from vectors.steering import SteeringVectors

Learn = Callable[[float], SteeringVectors]
"""Vectors of the given radius, e.g. lambda radius: replace(method, radius=radius)(model, prompts, generator)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiversityCusp:
    """The radius at which completions under different vectors come to differ (Mack & Turner 2024, MELBO).

    Diversity, the mean cosine distance between completions, is near 0 for small R, jumps, and stays near 1 once the
    text is gibberish. On log R such curves have a clear knee where the jump ends, but often no elbow where it begins,
    and past the knee vectors elicit little. So the knee is found (Kneedle, Satopaa et al. 2011, concave and rising),
    and of the radii tried the smallest past half of the rise up to it is chosen. Averaging over prompts comes last.
    """

    learn: Learn
    """function that learns vectors of a given radius"""
    radii: tuple[float, ...]
    """radii to try, five or more, fractions of the mean residual norm at the source layer"""
    embed: Callable[[list[str]], Float[Tensor, "n e"]] | None = None
    """function that embeds completions; None: counts of their tokens and pairs of tokens"""
    max_new_tokens: int = 12
    """number of tokens of the completions that are compared"""
    sensitivity: float = 1.0
    """sensitivity S of Kneedle: a larger one asks for a longer plateau behind the knee"""
    batch_size: int = 1024
    """number of batch rows (vectors x prompts) per generation"""

    def __post_init__(self):
        check_radii(self.radii, 5)

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice:
        """One radius, of those tried; vectors are learned at each.

        Raises:
            ValueError: the curve has no knee, fewer than two vectors, or embeddings of another number than texts.
        """
        embed = self.embed or (lambda texts: ngram_counts(texts, tokenizer))
        tried, values = sorted(self.radii), []
        for count, texts in _sweep(self, model, tokenizer, prompts, progress):
            if count < 2:
                raise ValueError(f"got {count} vectors; diversity needs at least 2")
            embedded = embed(texts)
            if embedded.ndim != 2 or len(embedded) != len(texts):
                raise ValueError(f"embed gave shape {tuple(embedded.shape)} for {len(texts)} texts; give one row each")
            # Texts come vector by vector: (k x n, e) back to (k, n, e).
            values.append(diversity(embedded.unflatten(0, (count, -1))))
        radius, threshold = _cusp(tried, values, self.sensitivity)
        return RadiusChoice(
            radii=(radius,),
            tried=tried,
            values=values,
            quantity="diversity of completions (mean cosine distance)",
            rule="diversity cusp",
            threshold=threshold,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The radius whose completions a judge likes best on average: any function of texts, such as a language model."""

    learn: Learn
    """function that learns vectors of a given radius"""
    radii: tuple[float, ...]
    """radii to try, fractions of the mean residual norm at the source layer"""
    judge: Callable[[list[str]], Sequence[float]]
    """function that scores completions, one score each; higher is better"""
    max_new_tokens: int = 24
    """number of tokens of the completions that are judged"""
    batch_size: int = 1024
    """number of batch rows (vectors x prompts) per generation"""

    def __post_init__(self):
        check_radii(self.radii, 1)

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        generator: torch.Generator,
        *,
        progress: Progress = iter,
    ) -> RadiusChoice:
        """One radius, of those tried; the smallest of equals.

        Raises:
            ValueError: the judge gave scores of another number than texts, or some that are not finite.
        """
        tried, values = sorted(self.radii), []
        for _, texts in _sweep(self, model, tokenizer, prompts, progress):
            scores = [float(score) for score in self.judge(texts)]
            if len(scores) != len(texts) or not all(map(math.isfinite, scores)):
                raise ValueError(
                    f"the judge gave {len(scores)} scores, {sum(map(math.isfinite, scores))} of them finite, "
                    f"for {len(texts)} texts; give one finite score per text"
                )
            values.append(sum(scores) / len(scores))
        return RadiusChoice(
            radii=(tried[values.index(max(values))],),
            tried=tried,
            values=values,
            quantity="mean score of the judge",
            rule="judged",
            threshold=None,
        )


def ngram_counts(texts: list[str], tokenizer: PreTrainedTokenizerBase, longest: int = 2) -> Float[Tensor, "n e"]:
    """How often each run of 1 to `longest` tokens occurs in each text; empty texts share a feature of their own."""
    features: dict[tuple[int, ...], int] = {}
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        grams = [tuple(ids[i : i + n]) for n in range(1, longest + 1) for i in range(len(ids) - n + 1)] or [()]
        rows.append(torch.tensor([features.setdefault(gram, len(features)) for gram in grams]))
    return torch.stack([row.bincount(minlength=len(features)) for row in rows]).float()


def diversity(embedded: Float[Tensor, "k n e"]) -> float:
    """Mean cosine distance between the completions of different vectors to one prompt, averaged over prompts."""
    count = len(embedded)
    unit = torch.nn.functional.normalize(embedded.float(), dim=-1).transpose(0, 1)
    cosines = unit @ unit.mT  # (n, k, k)
    # The cosine of a vector's completion with itself is 1 and says nothing of the others.
    same = cosines.diagonal(dim1=1, dim2=2).sum(-1)
    return float(1 - ((cosines.sum(dim=(1, 2)) - same) / (count * (count - 1))).mean())


def _cusp(radii: list[float], values: list[float], sensitivity: float) -> tuple[float, float]:
    """(radius, diversity half-way up to the knee); raises ValueError where there is no knee."""
    if max(values) - min(values) > 1e-6:
        logs = [math.log(radius) for radius in radii]
        found = KneeLocator(logs, values, S=sensitivity, curve="concave", direction="increasing", online=True)
        # A flat beginning passes for a knee on the diagonal; the end of the jump is the one highest above it.
        heights = [y - x for x, y in zip(found.all_norm_knees, found.all_norm_knees_y, strict=True)]
        if heights and max(heights) > 0:
            knee = logs.index(found.all_knees[heights.index(max(heights))])
            half = (min(values[: knee + 1]) + values[knee]) / 2
            return next(radius for radius, value in zip(radii, values, strict=True) if value >= half), half
    curve = ", ".join(f"{value:.3f} at {radius:.3g}" for radius, value in zip(radii, values, strict=True))
    raise ValueError(
        f"diversity has no knee: {curve}; where it stays low or still rises at the end try larger radii, "
        f"where it starts high smaller ones, or lower sensitivity {sensitivity}"
    )


def _sweep(
    rule: "DiversityCusp | Judged",
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    progress: Progress,
) -> Iterator[tuple[int, list[str]]]:
    """Per radius, ascending: how many vectors were learned, and the completions under them, vector-major."""
    ends = end_tokens(model, tokenizer)
    for radius in progress(sorted(rule.radii)):
        vectors = rule.learn(radius)
        # A `learn` that forgets its argument would give one flat curve for any model.
        if not math.isclose(vectors.radius, radius, rel_tol=1e-6):
            raise ValueError(
                f"learn({radius}) gave vectors of radius {vectors.radius}; pass the radius on to the method"
            )
        vectors.check(model)
        ids = complete_each(
            model,
            tokenizer,
            vectors,
            prompts,
            max_new_tokens=rule.max_new_tokens,
            batch_size=rule.batch_size,
        )
        replies = [until_end(row, ends) for row in ids.flatten(0, 1).tolist()]
        texts = tokenizer.batch_decode(replies, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        yield len(vectors), texts
