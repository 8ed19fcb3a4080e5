"""A network of your own, in one file, trained with AGR.

A Linen module that maps images `[batch, height, width, channels]` in [0, 1] to logits, its input
normalisation inside, called as `model.apply(variables, images, train=...)`. BatchNorm keeps its
running statistics in the collection `batch_stats`; this network has none. On a CPU, PGD is much
faster with the convolutions of `agr_jax.models.layers` than with Flax's.

Command: python launch.py --config=examples/own_network.py
         python launch.py --config=examples/own_network.py --config.agr.enabled=False
Cost: about a minute on two CPU cores.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from agr_jax.config import Config
from agr_jax.models.convolution import default_implementation
from agr_jax.models.layers import Conv, normalize
from configs import base


class ConvNet(nn.Module):
    """Two convolutions, the second with a stride of two, and a linear layer."""

    num_classes: int
    width: int = 32
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits; without BatchNorm training and evaluation are the same."""
        x = normalize(images, self.mean, self.std, self.dtype)
        for features, stride in ((self.width, 1), (2 * self.width, 2)):
            conv = Conv(features, 3, stride, default_implementation(), dtype=self.dtype)
            x = nn.relu(conv(x))
        logits = nn.Dense(self.num_classes, dtype=self.dtype)(x.reshape(len(x), -1))
        return logits.astype(jnp.promote_types(self.dtype, jnp.float32))  # losses need the digits


def create(config: Config, num_classes: int, dtype: Any) -> ConvNet:
    """What `config.model.name` names: from the run's config to the network."""
    model = config.model
    return ConvNet(num_classes, model.width or 32, model.mean, model.std, dtype)


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe on digits, with this network."""
    config = base.recipe("digits", "at", profile)
    config.name = "digits_own_network"
    config.model.name = "examples.own_network:create"
    return config
