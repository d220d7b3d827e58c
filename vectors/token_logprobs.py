"""Log-probability of given tokens under logits: the one place where log-softmax and gather meet."""

from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(logits: Float[Tensor, "*rows vocab"], ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Log-probability of each token in nats, computed in float32.

    Args:
        logits: scores of every token of the vocabulary, of any floating-point type.
        ids: the one token per row whose log-probability is wanted; its shape is that of `logits` without the last axis.
    """
    # float32 first: the 8 significant bits of bfloat16 are too few for log-probabilities of tens of nats.
    return logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
