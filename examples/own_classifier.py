"""AutoAttack on a classifier of your own: a plain function, Flax Linen, Flax NNX or Equinox.

Command: python examples/own_classifier.py [plain|linen|nnx|equinox]

All an attack needs is a callable from images [batch, height, width, channels] in [0, 1] to logits,
in evaluation mode. It is attacked with the weights that it has when it is passed, and others with
the same structure compile nothing.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agr_jax.attacks import autoattack
from agr_jax.threat import Linf

Network = Callable[[jax.Array], Any]


def plain() -> Network:
    """Any function; what it closes over may change between two calls."""
    weights = jax.random.normal(jax.random.key(0), (192, 10))
    return lambda images: images.reshape(len(images), -1) @ weights


def linen() -> Network:
    """A Linen module: `model.apply` and its variables."""
    import flax.linen as nn

    model = nn.Sequential([lambda x: x.reshape(len(x), -1), nn.Dense(10)])
    variables = model.init(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))
    return lambda images: model.apply(variables, images)


def nnx() -> Network:
    """An NNX module, after `model.eval()`."""
    from flax import nnx

    model = nnx.Linear(192, 10, rngs=nnx.Rngs(0))
    model.eval()
    return lambda images: model(images.reshape(len(images), -1))


def equinox() -> Network:
    """An Equinox module for one image, under `vmap`."""
    import equinox as eqx

    model = eqx.nn.Linear(192, 10, key=jax.random.key(0))
    return jax.vmap(lambda image: model(image.ravel()))


def main(kind: str = "plain") -> None:
    """Evaluates it on random images and prints the robust accuracy after each attack."""
    logits_fn = {"plain": plain, "linen": linen, "nnx": nnx, "equinox": equinox}[kind]()
    images = jax.random.uniform(jax.random.key(1), (20, 8, 8, 3))
    labels = logits_fn(images).argmax(-1)
    print(autoattack(Linf(0.01)).evaluate(logits_fn, images, labels, jax.random.key(2)))


if __name__ == "__main__":
    main(*sys.argv[1:])
