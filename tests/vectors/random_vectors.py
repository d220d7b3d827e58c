"""Random vectors for the tiny models, which are 32 wide."""

from vectors.methods.controls import random_directions
from vectors.steering import SteeringVectors


def some_vectors(generator, count=4, norm=6.0):
    return SteeringVectors(
        theta=norm * random_directions(count, 32, generator),
        source_layer=1,
        target_layer=3,
        radius=1.0,
        method="random",
        model_id="tiny",
    )
