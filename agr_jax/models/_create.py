"""Networks by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from agr_jax.models.convolution import Implementation, default_implementation
from agr_jax.models.layers import per_channel
from agr_jax.models.preact_resnet import PreActResNet
from agr_jax.models.wide_resnet import WideResNet

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
