"""Test images as the measurements take them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from agr_jax import sharding
from agr_jax.data import Split, to_unit_range


def as_floats(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Images as floats in [0, 1], and their labels, on the host."""
    return np.asarray(to_unit_range(jnp.asarray(split.images))), split.labels


def shared(tree: Any, mesh: Mesh) -> Any:
    """A pytree of rows on the devices: split where they can share them evenly, or else whole."""
    is_even = all(len(leaf) % mesh.size == 0 for leaf in jax.tree.leaves(tree))
    return sharding.put(
        tree, sharding.batch_sharding(mesh) if is_even else sharding.replicated(mesh)
    )
