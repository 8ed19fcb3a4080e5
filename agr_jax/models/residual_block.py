"""The pre-activation residual block that both families of networks are made of."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from agr_jax.models.convolution import Implementation
from agr_jax.models.layers import BatchNorm, Conv


class PreActBlock(nn.Module):
    """BN, ReLU, convolution, twice; where the shape changes, the shortcut reads the first ReLU.

    Attributes:
        features: output channels.
        stride: of the first convolution and of the shortcut.
        conv: convolution implementation, see `agr_jax.models.convolution`.
        kernel_init: initialiser of the kernels.
        axis_name: see `BatchNorm`.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
    """

    features: int
    stride: int
    conv: Implementation
    kernel_init: Initializer
    axis_name: str | None
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height', width', features]`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(name: str, size: int, stride: int) -> Conv:
            return Conv(
                self.features, size, stride, self.conv, self.kernel_init, name=name, **dtypes
            )

        def norm(name: str) -> BatchNorm:
            return BatchNorm(axis_name=self.axis_name, name=name, **dtypes)

        activated = nn.relu(norm("bn1")(features, train=train))
        shortcut = features
        if self.stride != 1 or features.shape[-1] != self.features:
            shortcut = conv("shortcut", 1, self.stride)(activated)
        out = conv("conv1", 3, self.stride)(activated)
        out = conv("conv2", 3, 1)(nn.relu(norm("bn2")(out, train=train)))
        return out + shortcut
