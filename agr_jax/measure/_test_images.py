"""Test images as the measurements take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from agr_jax.data import Split, to_unit_range


def as_floats(split: Split) -> tuple[jax.Array, jax.Array]:
    """Images as floats in [0, 1], and their labels."""
    return to_unit_range(jnp.asarray(split.images)), jnp.asarray(split.labels)
