"""AutoAttack on a classifier of your own: a plain function, Flax Linen, Flax NNX or Equinox.

Command: python examples/own_classifier.py [plain|linen|nnx|equinox]

All an attack needs is a function from images [batch, height, width, channels] in [0, 1] to logits,
in evaluation mode. Given as a `Partial` over the weights, it compiles once for all checkpoints.
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from agr_jax.attacks import autoattack
from agr_jax.threat import Linf


def plain() -> Partial:
    """Any function of weights and images."""
    weights = jax.random.normal(jax.random.key(0), (192, 10))
    return Partial(lambda weights, images: images.reshape(len(images), -1) @ weights, weights)


def linen() -> Partial:
    """A Linen module: `model.apply` and its variables."""
    import flax.linen as nn

    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])
    return Partial(model.apply, model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 3])))


def nnx() -> Partial:
    """An NNX module: split into its graph and its state, after `model.eval()`."""
    from flax import nnx

    model = nnx.Linear(192, 10, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return Partial(lambda s, images: nnx.merge(graph, s)(images.reshape(len(images), -1)), state)


def equinox() -> Partial:
    """An Equinox module for one image: arrays apart from the rest, and `vmap`."""
    import equinox as eqx

    model = eqx.nn.Linear(192, 10, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_array)

    def logits(arrays: Any, images: jax.Array) -> jax.Array:
        return jax.vmap(lambda image: eqx.combine(arrays, rest)(image.ravel()))(images)

    return Partial(logits, arrays)


def main(kind: str = "plain") -> None:
    """Evaluates it on random images and prints the robust accuracy after each attack."""
    logits_fn = {"plain": plain, "linen": linen, "nnx": nnx, "equinox": equinox}[kind]()
    images = jax.random.uniform(jax.random.key(1), (20, 8, 8, 3))
    labels = logits_fn(images).argmax(-1)
    print(autoattack(Linf(0.01)).evaluate(logits_fn, images, labels, jax.random.key(2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
