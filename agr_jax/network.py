"""The network of a run: as its config names it, and with the variables of a checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import FlaxError
from jax.sharding import Mesh

from agr_jax import checkpoints, mesh, models, own_code
from agr_jax import config as config_module
from agr_jax.config import Config
from agr_jax.data import Dataset
from agr_jax.errors import ConfigError
from agr_jax.models import Classifier
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
    if ":" in model.name:
        return _own(config, num_classes, dtype)
    try:
        mean, std = per_channel("mean", model.mean), per_channel("std", model.std)
    except ValueError as error:
        raise ConfigError(f"config.model.{error}") from error
    try:
        return models.create(
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


@functools.lru_cache(maxsize=8)
def _own(config: Config, num_classes: int, dtype: Any) -> nn.Module:
    """Made once for a config, as each one made would be compiled."""
    made = own_code.call("config.model.name", config.model.name, config, num_classes, dtype)
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"config.model.name: {config.model.name} must return a flax.linen.Module, "
            f"got {type(made).__name__}"
        )
    return made


def check(model: nn.Module, num_classes: int, image_shape: tuple[int, ...]) -> None:
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


def description(config: Config, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The model and the data set, as a checkpoint's `about` holds them."""
    as_dict = config_module.to_dict(config)
    drawn = config.data.train_examples or config.data.validation_examples
    return {
        "model": {
            **{name: as_dict["model"][name] for name in ("name", "width", "mean", "std")},
            "num_classes": dataset.num_classes,
            "image_shape": list(dataset.image_shape),
        },
        "data set": {
            "name": dataset.name,
            "complete": dataset.complete,
            "train_examples": config.data.train_examples,
            "validation_examples": config.data.validation_examples,
            # Another split would hold out what a base was trained on.
            "split_seed": config.seed if drawn else None,
        },
    }


def load_classifier(
    checkpoint: Path, config: Config, dataset: Dataset, on: Mesh, *, item: str = "variables"
) -> tuple[Classifier, dict[str, Any]]:
    """Reads a checkpoint's network; `item` is `variables`, or `average` for the averaged one.

    Returns:
        The classifier, and the checkpoint's `about`.

    Raises:
        CheckpointError: if it is a checkpoint of another model or data set.
    """
    about = checkpoints.read_about(checkpoint)
    checkpoints.check_same(about, description(config, dataset), checkpoint)
    model = from_config(config, dataset.num_classes)
    image = jnp.zeros([1, *dataset.image_shape])
    shapes = jax.eval_shape(lambda: dict(model.init(jax.random.key(0), image)))
    everywhere = mesh.replicated(on)
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
    )
    return Classifier(model, checkpoints.restore(checkpoint, item, like)), about
