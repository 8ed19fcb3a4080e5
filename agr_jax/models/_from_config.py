"""The network that a config names."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from agr_jax.config import Config, imported
from agr_jax.errors import ConfigError
from agr_jax.models._create import create
from agr_jax.models.layers import per_channel


def from_config(config: Config, num_classes: int, dtype: Any = jnp.float32) -> nn.Module:
    """The network that a config names, on this backend.

    Args:
        config: settings of the run; `config.model.name` is a name of `agr_jax.models.create`, or
            `MODULE:FUNCTION` of your own, called with the config, the number of classes and the
            dtype.
        num_classes: number of logits.
        dtype: of the computation.

    Raises:
        ConfigError: on an unknown name, on a mean or std that is not one of images in [0, 1], or if
            the function returns no Linen module.
    """
    model = config.model
    if imported.is_imported(model.name):
        made = imported.constant("config.model.name", model.name, config, num_classes, dtype)
        if not isinstance(made, nn.Module):
            raise ConfigError(
                f"config.model.name: {model.name} must return a flax.linen.Module, "
                f"got {type(made).__name__}"
            )
        return made
    try:
        mean, std = per_channel("mean", model.mean), per_channel("std", model.std)
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from error
    try:
        return create(
            model.name,
            num_classes,
            width=model.width or None,
            mean=mean,
            std=std,
            conv=None if model.conv == "auto" else model.conv,
            dtype=dtype,
        )
    except ValueError as error:
        raise ConfigError(f"config.model.name: {error}, or MODULE:FUNCTION of your own") from error


def check_trainable(model: nn.Module, num_classes: int, image_shape: tuple[int, ...]) -> None:
    """Refuses a network that cannot be trained here; nothing is computed.

    Raises:
        ConfigError: if it does not take `train`, or needs random numbers; if its logits are not
            `[batch, classes]`; or if it has variables other than parameters and BatchNorm's
            statistics.
    """
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    try:
        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        logits = jax.eval_shape(model.apply, variables, images)
        jax.eval_shape(train, variables, images)
    except (TypeError, FlaxError) as error:
        raise ConfigError(
            "config.model.name: the network must be called as model.apply(variables, images, "
            "train=...), without random numbers: " + " ".join(str(error).split())
        ) from error
    others = sorted(set(variables) - {"params", "batch_stats"})
    if others or "params" not in variables:
        raise ConfigError(
            "config.model.name: the network must have 'params' and at most 'batch_stats' beside "
            f"them, got {', '.join(map(repr, variables)) or 'no variables'}"
        )
    if getattr(logits, "shape", None) != (2, num_classes):
        raise ConfigError(
            f"config.model.name: the network must map [batch, {', '.join(map(str, image_shape))}] "
            f"to logits [batch, {num_classes}], got {logits} for a batch of 2"
        )
