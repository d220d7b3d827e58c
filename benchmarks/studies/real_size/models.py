"""What speed and memory are measured on: an organism, a clean pretrained base, or random weights in the shape of 1B."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from attacks.dry_run import LIKELY_BEHAVIOUR
from benchmarks.organisms import zoo
from benchmarks.organisms.pretrained.fetch import PACKAGED
from vectors.methods.controls import random_directions
from vectors.steering import SteeringVectors, model_id


def loaded(
    name: str, random_layers: int | None = None, vocabulary: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, str]:
    """(model, tokenizer, a clean prompt, behaviour).

    Args:
        name: an organism, or a pretrained base that was fetched.
        random_layers: layers of a model of random weights that takes the model's place; None: the model itself.
        vocabulary: embeddings of that model; None: as many as the model has.

    Raises:
        ValueError: no such model, or fewer than 2 random layers.
    """
    if name in PACKAGED:
        model, tokenizer = zoo.load_base(base=name)
        text, behaviour = zoo.text_split().search[0], LIKELY_BEHAVIOUR
    else:
        organism = zoo.load(name)
        model, tokenizer = organism.model, organism.tokenizer
        text, behaviour = organism.prompts.search[0], organism.triggers[0][1]
    if random_layers is not None:
        if random_layers < 2:
            raise ValueError(f"random_layers is {random_layers}; give at least 2")
        model = of_1b_shape(model, random_layers, vocabulary or model.config.vocab_size)
    return model, tokenizer, text, behaviour


def of_1b_shape(like: PreTrainedModel, layers: int, vocabulary: int) -> PreTrainedModel:
    """Random weights in layers like those of Llama 3.2 1B, with the context and dtype of another model."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=like.config.max_position_embeddings,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with like.device:  # a billion random numbers take a CPU half a minute
        network: Any = LlamaForCausalLM(config)
    return network.eval().requires_grad_(False).to(like.dtype)


def random_vectors(model: PreTrainedModel, source: int) -> SteeringVectors:
    """One vector of random direction, for what does not depend on which."""
    layers = model.config.num_hidden_layers
    theta = random_directions(1, model.config.hidden_size, torch.Generator().manual_seed(0))
    return SteeringVectors(
        theta=theta, source_layer=source, target_layer=layers, radius=1.0, method="random", model_id=model_id(model)
    )
