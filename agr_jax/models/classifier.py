"""A network with its variables as a function from images to logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A network with its variables, in evaluation mode, as a function from images to logits.

    A pytree: `jit` sees the network as a constant and the variables as arguments, so attacking a
    second checkpoint compiles nothing.

    Attributes:
        model: Linen module called as `model.apply(variables, images)`.
        variables: `{"params": ..., "batch_stats": ...}`, the second only with BatchNorm.
    """

    model: nn.Module = dataclasses.field(metadata={"static": True})
    variables: Mapping[str, Any]

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[batch, height, width, channels]`, floats in [0, 1], to logits.

        Raises:
            ValueError: on integers, such as pixels in 0..255.
        """
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images must be floats in [0, 1], got dtype {images.dtype}; divide pixels by 255"
            )
        logits = self.model.apply(self.variables, images)
        assert isinstance(logits, jax.Array)
        return logits
