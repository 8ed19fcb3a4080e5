"""Exact selection in rows of non-negative floats, without sorting them.

The bits of non-negative floats, read as integers, have the order of the floats. Bisection on them
takes as many passes as a float has bits, each a count or a sum along the row: on every backend
faster than a sort of thousands of pixels, and exact. The integers are compared, not the floats:
XLA takes subnormal floats for 0.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def kth_smallest(values: jax.Array, rank: jax.Array | int) -> jax.Array:
    """The entry at `rank` of each row in ascending order.

    Args:
        values: `[..., n]`, finite and >= 0.
        rank: integers `[...]` in `[0, n)`, or one for all rows.

    Returns:
        `[...]`, entries of `values`.
    """
    bits = _bits(values)
    return _least(bits, values.dtype, lambda level: (bits <= level[..., None]).sum(-1) > rank)


def largest_level(values: jax.Array, weights: jax.Array, total: jax.Array) -> jax.Array:
    """The largest level such that the weights of the entries at or above it sum to `total`.

    Args:
        values: `[..., n]`, finite and >= 0.
        weights: `[..., n]`, >= 0.
        total: `[...]`, > 0.

    Returns:
        `[...]`: an entry of each row of `values`, or 0 where all its weights together are less
        than `total`.
    """
    bits = _bits(values)

    def too_high(level: jax.Array) -> jax.Array:
        return jnp.where(bits > level[..., None], weights, 0).sum(-1) < total

    return _least(bits, values.dtype, too_high)


def _bits(values: jax.Array) -> jax.Array:
    """Non-negative floats as integers of the same order."""
    integer = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}[values.dtype.itemsize]
    return jnp.maximum(lax.bitcast_convert_type(values, integer), 0)  # -0 is 0


def _least(bits: jax.Array, dtype: jnp.dtype, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The least float in [0, row's maximum] whose bits fulfil what all larger ones fulfil too."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        true = holds(middle)
        return jnp.where(true, low, middle + 1), jnp.where(true, middle, high)

    highest = bits.max(-1)
    # A fixed number, which is hardly ever more than needed: no device waits for another's rows.
    halvings = 8 * bits.dtype.itemsize - 1
    low, _ = lax.fori_loop(0, halvings, halve, (jnp.zeros_like(highest), highest))
    return lax.bitcast_convert_type(low, dtype)
