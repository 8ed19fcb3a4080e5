"""What an attack climbs, and the mean of its gradient over a randomised network's draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax import losses
from agr_jax.attacks._attack import LossFn
from agr_jax.threat import expand


def climbed(loss: LossFn) -> LossFn:
    """What an attack that is given a loss climbs: for the cross-entropy, its log odds.

    Both rise together and point the same way, but the log odds do not saturate.
    """
    return losses.log_odds if loss is losses.cross_entropy else loss


def mean_over_draws(
    evaluate: Callable[[jax.Array], tuple[jax.Array, Any, jax.Array]],
    keys: jax.Array,
    *,
    of_log_odds: bool,
) -> tuple[Any, jax.Array]:
    """Mean gradient of a randomised network's draws, and the rest of the last one's results.

    Args:
        evaluate: from a key to what was climbed, `[batch]`, anything, and the gradient.
        keys: one for each draw.
        of_log_odds: what was climbed is log odds, but the mean of the cross-entropy is meant, whose
            gradient is `sigmoid(log odds)` times theirs: up to a factor for each image, which keeps
            the sum away from 0.
    """

    def weighted(key: jax.Array) -> tuple[jax.Array, Any, jax.Array]:
        climbed, rest, gradient = evaluate(key)
        weight = jax.nn.log_sigmoid(climbed) if of_log_odds else jnp.zeros_like(climbed)
        return weight, rest, gradient

    def add(carry: Any, key: jax.Array) -> tuple[Any, None]:
        largest, _, summed = carry
        weight, rest, gradient = weighted(key)
        larger = jnp.maximum(largest, weight)
        summed = expand(jnp.exp(largest - larger), summed) * summed
        return (larger, rest, summed + expand(jnp.exp(weight - larger), summed) * gradient), None

    (_, rest, summed), _ = lax.scan(add, weighted(keys[0]), keys[1:])
    return rest, summed / len(keys)
