"""Whether a network is right at a point; for a randomised network, what most of its draws say."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax.attacks._tracing import Traced


@functools.partial(jax.jit, static_argnums=0)
def judge(
    draws: int, network: Traced, points: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, which predictions are right, and the predictions.

    Of a randomised network the logits of the first of several draws, what more than half of them
    say of being right, and the most frequent prediction.
    """
    if not draws:
        logits = network(points)
        predictions = jnp.argmax(logits, axis=1)
        return logits, predictions == labels, predictions
    keys = jax.random.split(key, draws)
    first = network(points, keys[0])
    counts = _counts(first.shape[1], network, points, keys)
    right = (counts * jax.nn.one_hot(labels, first.shape[1], dtype=jnp.int32)).sum(1)
    return first, 2 * right > draws, jnp.argmax(counts, axis=1)


def _counts(classes: int, network: Traced, points: jax.Array, keys: jax.Array) -> jax.Array:
    """How many draws predict each class, `[batch, classes]`."""

    def add(counts: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        predictions = jnp.argmax(network(points, key), axis=1)
        return counts + jax.nn.one_hot(predictions, classes, dtype=jnp.int32), None

    return lax.scan(add, jnp.zeros([points.shape[0], classes], jnp.int32), keys)[0]


@functools.partial(jax.jit, static_argnums=0)
def share_of_right(
    draws: int, network: Traced, points: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
    """Of each image's draws, the share that is right, `[batch]`."""
    classes = network.program.value.shape[1]
    counts = _counts(classes, network, points, jax.random.split(key, draws))
    return (counts * jax.nn.one_hot(labels, classes, dtype=jnp.int32)).sum(1) / draws
