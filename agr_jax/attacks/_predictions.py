"""What attacks read off logits: which images are misclassified, and the likeliest wrong class."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agr_jax import losses


def misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the prediction is not the label, `[batch]`; NaN logits are no prediction."""
    return (jnp.argmax(logits, axis=1) != labels) & ~jnp.isnan(logits).any(axis=1)


def surely_misclassified(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Where the prediction is wrong by more than another order of a sum may change, `[batch]`.

    For attacks that seek the boundary itself: another program that computes the same network may
    see a point that is closer on its other side. A tie that is no matter of rounding counts.
    """
    margin = losses.margin(logits, labels)
    rounding = 2 * jnp.finfo(logits.dtype).eps * jnp.abs(logits).max(-1)
    return misclassified(logits, labels) & ((margin == 0) | (margin > rounding))


def likeliest_wrong_class(logits: jax.Array, labels: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The class with the `rank`-th largest logit (from 0) beside the label, `[batch]`.

    `rank` is one number, or one for each image.
    """
    num_classes = logits.shape[1]
    is_label = jax.nn.one_hot(labels, num_classes, dtype=bool)
    by_logit = jnp.argsort(jnp.where(is_label, jnp.inf, logits), axis=1)
    position = num_classes - 2 - jnp.broadcast_to(rank, labels.shape)
    # A sum, not an index, which would gather from all devices.
    return jnp.where(jax.nn.one_hot(position, num_classes, dtype=bool), by_logit, 0).sum(1)
