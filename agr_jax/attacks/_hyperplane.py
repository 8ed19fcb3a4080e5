"""The nearest point of a hyperplane inside the box [0, 1], in the L-infinity, L2 or L1 norm.

For a point x, weights w and an excess c, the step d of least norm with `w . d = -c` and `x + d` in
[0, 1]. Every pixel moves against the sign of its weight, by at most the room that it has; how far
is one number, common to all pixels. Where the hyperplane does not meet the box, every pixel moves
to its border.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack", ICML 2020, section 3.1.
https://arxiv.org/abs/1907.02044
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax.order_statistics import largest_level
from agr_jax.threat import L1, L2, Linf

# The published code leaves pixels with smaller weights alone, under L2 and L1.
_LEAST_WEIGHT = 1e-8
# Normals whose largest weight is below this are scaled before that.
_SHORT = 1e-3


def step_to_hyperplane(
    threat: Linf | L2 | L1, points: jax.Array, weights: jax.Array, excess: jax.Array
) -> jax.Array:
    """The step d from each point.

    Args:
        threat: whose norm is meant; its radius is not used.
        points: `[..., pixels]` in [0, 1].
        weights: `[..., pixels]`, normal of each hyperplane; leading axes as of `points`, or 1.
        excess: `[...]`, `w . x - b`: the value that the step has to take away.
    """
    # The same hyperplane: short normals are of another scale, not of less use.
    largest = jnp.abs(weights).max(-1)
    scale = 1 / jnp.where((largest > 0) & (largest < _SHORT), largest, 1)
    weights, excess = weights * scale[..., None], excess * scale
    excess_sign = jnp.where(excess >= 0, 1, -1).astype(points.dtype)
    signed = weights * excess_sign[..., None]
    size = jnp.abs(signed)
    if not isinstance(threat, Linf):
        size = jnp.where(size > _LEAST_WEIGHT, size, 0)
    room = jnp.where(signed > 0, points, 1 - points)
    room = jnp.where(size > 0, room, 0)
    needed = jnp.abs(excess)
    if isinstance(threat, L1):
        amount = _largest_weights_first(size, room, needed)
    else:
        slope = jnp.where(size > 0, 1, 0) if isinstance(threat, Linf) else size
        amount = _proportional(size, slope.astype(size.dtype), room, needed)
    return -jnp.sign(signed) * amount


def _proportional(
    size: jax.Array, slope: jax.Array, room: jax.Array, needed: jax.Array
) -> jax.Array:
    """`min(scale * slope, room)` with the scale at which its inner product with `size` is `needed`.

    That product is concave and piecewise linear in the scale, so Newton's method from 0 climbs to
    the solution, piece by piece, and is exact once it is on the right one.
    """

    def full(scale: jax.Array) -> jax.Array:
        return scale[..., None] * slope >= room

    def newton(scale: jax.Array) -> jax.Array:
        at_border = full(scale)
        left = needed - jnp.where(at_border, size * room, 0).sum(-1)
        rate = jnp.where(at_border, 0, size * slope).sum(-1)
        return jnp.where(rate > 0, left / jnp.where(rate > 0, rate, 1), jnp.inf)

    def climb(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        scale, _ = carry
        higher = jnp.maximum(scale, newton(scale))
        return higher, higher > scale

    def unfinished(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(carry[1])

    start = jnp.zeros_like(needed), jnp.ones_like(needed, bool)
    scale, _ = lax.while_loop(unfinished, climb, start)
    # No product of 0 and infinity.
    return jnp.where(
        full(scale), room, jnp.minimum(scale, jnp.finfo(size.dtype).max)[..., None] * slope
    )


def _largest_weights_first(size: jax.Array, room: jax.Array, needed: jax.Array) -> jax.Array:
    """All the room of the pixels of largest weight, and a part of the last one's."""
    level = largest_level(size, size * room, needed)[..., None]
    above = size > level
    tied = (size == level) & (size > 0)
    left = needed - jnp.where(above, size * room, 0).sum(-1)
    # Pixels of the same weight in their order, until what is left is used up.
    tied_room = jnp.where(tied, room, 0)
    before = jnp.cumsum(tied_room, axis=-1) - tied_room
    part = jnp.clip(left[..., None] / jnp.where(tied, size, 1) - before, 0, tied_room)
    return jnp.where(above, room, part)
