"""Networks in Flax Linen, with the input normalisation inside.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax import models
    >>> model = models.create("preactresnet18", num_classes=10, width=8)
    >>> variables = model.init(jax.random.key(0), jnp.zeros([1, 32, 32, 3]))
    >>> classifier = models.Classifier(model, variables)
    >>> classifier(jnp.zeros([2, 32, 32, 3])).shape
    (2, 10)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from agr_jax.models.convolution import Implementation, default_implementation
from agr_jax.models.layers import per_channel
from agr_jax.models.preact_resnet import PreActResNet
from agr_jax.models.pretrained import pretrained_names, read_pretrained
from agr_jax.models.wide_resnet import WideResNet

__all__ = [
    "Classifier",
    "PreActResNet",
    "WideResNet",
    "create",
    "load_pretrained",
    "pretrained_names",
]

_NAMES = (
    "'preactresnet18' or 'wrn<depth>_<widen factor>' with a depth of 6 n + 4, as 'wrn34_10', "
    "either with '_silu' at its end"
)


def create(
    name: str,
    num_classes: int,
    *,
    width: int | None = None,
    mean: float | Sequence[float] = (0.0,),
    std: float | Sequence[float] = (1.0,),
    conv: Implementation | None = None,
    axis_name: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> PreActResNet | WideResNet:
    """Makes a network by name.

    Args:
        name: `"preactresnet18"`, or `"wrn<depth>_<widen factor>"` such as `"wrn34_10"`; with
            `"_silu"` at its end, as in `"wrn28_10_silu"`, the variant of Gowal et al.
            (RobustBench's DMWideResNet and DMPreActResNet).
        num_classes: number of logits.
        width: channels of the first convolution; by default the published 64 (PreAct-ResNet) or 16
            (WideResNet). Smaller for small machines.
        mean: input mean per channel, or one number for all, for images in [0, 1]: at most 1.
        std: input standard deviation likewise, above 0 and at most 1.
        conv: `"canonical"` or `"plain"`, see `agr_jax.models.convolution`; by default the faster
            one on this backend.
        axis_name: mapped axis over which BatchNorm averages, under `pmap` and `shard_map`.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.

    Raises:
        ValueError: on an unknown name, or a mean or std that is not one of images in [0, 1].
    """
    settings: dict[str, Any] = {
        "num_classes": num_classes,
        "mean": per_channel("mean", mean),
        "std": per_channel("std", std),
        "conv": conv or default_implementation(),
        "axis_name": axis_name,
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    if width is not None:
        settings["width"] = width
    family = name.removesuffix("_silu")
    settings["silu"] = name != family
    if family == "preactresnet18":
        return PreActResNet(**settings)
    match = re.fullmatch(r"wrn(\d+)_(\d+)", family)
    if match and int(match[1]) >= 10 and int(match[1]) % 6 == 4 and int(match[2]) >= 1:
        return WideResNet(depth=int(match[1]), widen_factor=int(match[2]), **settings)
    raise ValueError(f"unknown model {name!r}: choose {_NAMES}")


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


def load_pretrained(name: str, *, conv: Implementation | None = None) -> Classifier:
    """A small trained network that comes with this package; see `docs/experiments.md`.

    Args:
        name: one of `pretrained_names()`: `"cifar10-width16-at"`, `"cifar10-width16-agr"` and
            `"cifar10-width16-best"`, PreAct-ResNet-18 of width 16 trained on 10,000 images, whose
            evaluations lie beside the weights.
        conv: as `create`.

    Returns:
        A classifier of images in [0, 1], `[batch, 32, 32, 3]`, with the normalisation inside.

    Raises:
        ValueError: on an unknown name.

    Example:
        >>> import jax.numpy as jnp
        >>> from agr_jax import models
        >>> classifier = models.load_pretrained("cifar10-width16-at")
        >>> classifier(jnp.zeros([2, 32, 32, 3])).shape
        (2, 10)
    """
    variables, record = read_pretrained(name)
    settings = record["model"]
    model = create(
        settings["name"],
        settings["num_classes"],
        width=settings["width"],
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        conv=conv,
    )
    return Classifier(model, variables)
