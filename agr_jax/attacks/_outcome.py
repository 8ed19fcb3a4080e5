"""What one unit of an attack finds, and where it could not see."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from agr_jax.threat import flatten


class Blind(NamedTuple):
    """Where an attack could not see which way the loss rises, from where it started.

    Attributes:
        zero_gradient: booleans `[batch]`: no entry of the gradient differs from 0.
        nan_gradient: booleans `[batch]`: an entry is NaN.
    """

    zero_gradient: jax.Array
    nan_gradient: jax.Array

    @classmethod
    def of(cls, gradient: jax.Array) -> Blind:
        """Looks at a batch of gradients."""
        flat = flatten(gradient)
        return cls(~jnp.any(flat != 0, axis=1), jnp.any(jnp.isnan(flat), axis=1))

    def or_first(self, index: jax.Array, gradient: jax.Array) -> Blind:
        """That of the gradient if it is the first of a loop, with index 0; else as before."""
        blind: Blind = lax.cond(index == 0, Blind.of, lambda _: self, gradient)
        return blind

    @classmethod
    def nowhere(cls, labels: jax.Array) -> Blind:
        """All false."""
        return cls(jnp.zeros_like(labels, bool), jnp.zeros_like(labels, bool))

    def both(self, other: Blind) -> Blind:
        """Of two runs: no gradient in either, NaN in any."""
        return Blind(
            self.zero_gradient & other.zero_gradient, self.nan_gradient | other.nan_gradient
        )


class UnitOutcome(NamedTuple):
    """What one restart, or one target class, of an attack found.

    Attributes:
        points: `[batch, ...]`, in the ball and the box: misclassified where `fooled`, elsewhere
            the best point that the attack met.
        fooled: booleans `[batch]`.
        blind: where the loss had no gradient, or a NaN one, at the start.
    """

    points: jax.Array
    fooled: jax.Array
    blind: Blind
