"""Pre-activation ResNet for small images."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from agr_jax.models.convolution import Implementation
from agr_jax.models.layers import BatchNorm, Conv, Linear, normalize, torch_default_init
from agr_jax.models.residual_block import PreActBlock


class PreActResNet(nn.Module):
    """Pre-activation ResNet; `blocks=(2, 2, 2, 2)` and `width=64` is PreAct-ResNet-18.

    Takes images in [0, 1] and normalises them itself. Initialised as PyTorch initialises its
    layers by default.

    Attributes:
        num_classes: number of logits.
        blocks: residual blocks in each of the four stages.
        width: channels of the first stage; each later stage has twice as many as the one before.
        mean: input mean per channel, in [0, 1].
        std: input standard deviation per channel.
        conv: convolution implementation, see `agr_jax.models.convolution`.
        axis_name: see `BatchNorm`.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
        silu: the variant of Gowal et al.: SiLU for ReLU, zeros below and right where the stride is
            2, and 3 x 3 shortcuts of a block's input.

    Source: He et al., "Identity Mappings in Deep Residual Networks", ECCV 2016, as adversarial
    training uses it (batch normalisation and ReLU before the pooling); the variant: the code of
    Gowal et al., "Uncovering the Limits of Adversarial Training", 2020.
    https://arxiv.org/abs/1603.05027, https://arxiv.org/abs/2010.03593
    """

    num_classes: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    width: int = 64
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
        features = Conv(self.width, 3, 1, self.conv, name="conv1", **dtypes)(features)
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                features = PreActBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    kernel_init=torch_default_init,
                    axis_name=self.axis_name,
                    silu=self.silu,
                    wide_shortcut=self.silu,
                    name=f"layer{stage + 1}_{block}",
                    **dtypes,
                )(features, train=train)
        features = BatchNorm(axis_name=self.axis_name, name="bn", **dtypes)(features, train=train)
        pooled = (nn.silu if self.silu else nn.relu)(features).mean((1, 2))
        logits = Linear(self.num_classes, name="linear", **dtypes)(pooled)
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))
