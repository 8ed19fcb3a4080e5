"""Wide residual network for small images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from agr_jax.models.convolution import Implementation
from agr_jax.models.layers import BatchNorm, Conv, Linear, normalize, torch_default_init
from agr_jax.models.residual_block import PreActBlock

_conv_init = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class WideResNet(nn.Module):
    """WideResNet-`depth`-`widen_factor`, taking images in [0, 1] and normalising them itself.

    Attributes:
        num_classes: number of logits.
        depth: 6 n + 4, with n blocks in each of the three stages.
        widen_factor: k; the stages have `width * k * (1, 2, 4)` channels.
        width: channels of the first convolution; 16 in the published networks.
        mean: input mean per channel, in [0, 1].
        std: input standard deviation per channel.
        conv: convolution implementation, see `agr_jax.models.convolution`.
        axis_name: see `BatchNorm`.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
        silu: the variant of Gowal et al.: SiLU for ReLU, zeros below and right where the stride is
            2, and PyTorch's default initialisation.

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, as TRADES uses it; the
    variant: Gowal et al., "Uncovering the Limits of Adversarial Training", 2020.
    https://arxiv.org/abs/2010.03593, https://arxiv.org/abs/1605.07146
    """

    num_classes: int
    depth: int = 34
    widen_factor: int = 10
    width: int = 16
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    conv: Implementation = "plain"
    axis_name: str | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    silu: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps images `[batch, height, width, channels]` in [0, 1] to logits `[batch, classes]`."""
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        features = normalize(images, self.mean, self.std, self.dtype)
        kernel_init = torch_default_init if self.silu else _conv_init
        features = Conv(self.width, 3, 1, self.conv, kernel_init, name="conv1", **dtypes)(features)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                features = PreActBlock(
                    features=self.width * self.widen_factor * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    kernel_init=kernel_init,
                    axis_name=self.axis_name,
                    silu=self.silu,
                    name=f"block{stage + 1}_{block}",
                    **dtypes,
                )(features, train=train)
        features = BatchNorm(axis_name=self.axis_name, name="bn1", **dtypes)(features, train=train)
        pooled = (nn.silu if self.silu else nn.relu)(features).mean((1, 2))
        linear = Linear(self.num_classes, zero_bias=not self.silu, name="fc", **dtypes)
        logits = linear(pooled)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))
