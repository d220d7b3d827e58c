"""What something will cost, reckoned before it is executed. What was executed is counted by `vectors.operations`."""

from transformers import PreTrainedModel

from attacks.scoring.problem import Problem
from vectors.operations import weights_of
from vectors.residual import decoder


def forward_flops(model: PreTrainedModel, tokens: int, *, first: int = 0, last: int | None = None) -> float:
    """Operations of a forward pass of so many tokens through blocks `first` to `last` - 1 (None: to the end)."""
    return 2.0 * tokens * sum(map(weights_of, decoder(model).layers[first:last]))


def trigger_flops(model: PreTrainedModel, problem: Problem, trigger: float, target: int = 0) -> float:
    """Operations of scoring one trigger of so many tokens, and `target` tokens of a reply, on every prompt.

    What stands before the slot is read once for all triggers and not counted. `trigger` may be an average.
    """
    return forward_flops(model, round(sum(trigger + len(after) + target for after in problem.after)))


def learning_flops(model: PreTrainedModel, tokens: int, *, source: int) -> float:
    """Operations of one forward and backward pass from residual `source` to the output, unembedding left out."""
    return 2.0 * forward_flops(model, tokens, first=source)


def head_flops(model: PreTrainedModel, tokens: int) -> float:
    """Operations of unembedding so many tokens."""
    return 2.0 * tokens * weights_of(decoder(model).head)


def completion_flops(model: PreTrainedModel, problem: Problem, trigger: int, answer: int) -> float:
    """Operations of completing every prompt once with a trigger of `trigger` tokens by `answer` tokens."""
    prompts = sum(map(len, problem.filled([]))) + len(problem) * trigger
    return forward_flops(model, prompts + len(problem) * answer) + head_flops(model, len(problem) * (answer + 1))
