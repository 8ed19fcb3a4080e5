"""The pre-activation residual block that both families of networks are made of."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.nn.initializers import Initializer

from agr_jax.models.convolution import Implementation
from agr_jax.models.layers import BatchNorm, Conv


class PreActBlock(nn.Module):
    """BN, activation, convolution, twice; a convolution is the shortcut where the shape changes.

    It reads the first activation, or, if it is wide, the block's input.

    Attributes:
        features: output channels.
        stride: of the first convolution and of the shortcut.
        conv: convolution implementation, see `agr_jax.models.convolution`.
        kernel_init: initialiser of the kernels.
        axis_name: see `BatchNorm`.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
        silu: SiLU for ReLU, and zeros below and right, not all around, where the stride is 2.
        wide_shortcut: a 3 x 3 shortcut of the block's input.
    """

    features: int
    stride: int
    conv: Implementation
    kernel_init: Initializer
    axis_name: str | None
    dtype: Any
    param_dtype: Any
    silu: bool = False
    wide_shortcut: bool = False

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        """Maps `[batch, height, width, in]` to `[batch, height', width', features]`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        activation = nn.silu if self.silu else nn.relu

        def conv(name: str, size: int, stride: int) -> Conv:
            return Conv(
                self.features,
                size,
                stride,
                self.conv,
                self.kernel_init,
                # What TensorFlow's SAME pads where height and width are even.
                padding=(0, 1) if self.silu and size == 3 and stride == 2 else None,
                name=name,
                **dtypes,
            )

        def norm(name: str) -> BatchNorm:
            return BatchNorm(axis_name=self.axis_name, name=name, **dtypes)

        activated = activation(norm("bn1")(features, train=train))
        shortcut = features
        if self.stride != 1 or features.shape[-1] != self.features:
            size, source = (3, features) if self.wide_shortcut else (1, activated)
            shortcut = conv("shortcut", size, self.stride)(source)
        out = conv("conv1", 3, self.stride)(activated)
        out = conv("conv2", 3, 1)(activation(norm("bn2")(out, train=train)))
        return out + shortcut
