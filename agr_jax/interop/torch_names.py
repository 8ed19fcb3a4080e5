"""What PyTorch calls the tensors of our networks, and which network a file's tensors are of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from agr_jax import models
from agr_jax.errors import CheckpointError

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


@dataclasses.dataclass(frozen=True)
class _Names:
    """How one published code names its layers.

    Attributes:
        block: name of a residual block, with the number of its stage and its own.
        first_stage: number of the first stage, which is 1 here.
        parts: what it calls the parts of a block that have another name here.
        others: what it calls the layers outside of blocks that have another name here.
    """

    block: str
    first_stage: int
    parts: Mapping[str, str]
    others: Mapping[str, str]


_FAMILIES = {
    "preactresnet18": _Names("layer{}.{}", 1, {"shortcut": "shortcut.0"}, {}),
    "wrn": _Names("block{}.layer.{}", 1, {"shortcut": "convShortcut"}, {}),
    "preactresnet18_silu": _Names(
        "layer_{}.{}",
        0,
        {
            "bn1": "batchnorm_0",
            "conv1": "conv_2d_1",
            "bn2": "batchnorm_1",
            "conv2": "conv_2d_2",
        },
        {"conv1": "conv_2d", "bn": "batchnorm", "linear": "logits"},
    ),
    "wrn_silu": _Names(
        "layer.{}.block.{}",
        0,
        {"bn1": "batchnorm_0", "conv1": "conv_0", "bn2": "batchnorm_1", "conv2": "conv_1"},
        {"conv1": "init_conv", "bn1": "batchnorm", "fc": "logits"},
    ),
}
# What the tensors of each one's first stage begin with.
_STARTS = {family: names.block.format(names.first_stage, "") for family, names in _FAMILIES.items()}
NAMES_SHOWN = 4
"""Most that an error lists."""


def tensor_name(leaf_path: Any, network: str) -> str:
    """PyTorch's name of a leaf, given its path in the variables of a network."""
    _, *modules, leaf = jax.tree_util.keystr(leaf_path, simple=True, separator="/").split("/")
    return f"{layer_name('.'.join(modules), network)}.{_LEAVES.get(leaf, leaf)}"


def layer_name(name: str, network: str) -> str:
    """PyTorch's name of a layer of a network, as of `block1_0.conv1` or `fc`."""
    names = _FAMILIES[re.sub(r"^wrn\d+_\d+", "wrn", network)]
    ours = "layer" if network.startswith("preact") else "block"
    in_block = re.fullmatch(rf"{ours}(\d+)_(\d+)\.(\w+)", name)
    if not in_block:
        return names.others.get(name, name)
    stage, block, part = in_block.groups()
    prefix = names.block.format(int(stage) - 1 + names.first_stage, block)
    return f"{prefix}.{names.parts.get(part, part)}"


def by_tensor_name(tree: Any, network: str) -> dict[str, Any]:
    """The leaves of a tree of variables by PyTorch's names."""
    return {
        tensor_name(leaf_path, network): leaf for leaf_path, leaf in jax.tree.leaves_with_path(tree)
    }


def network_name(model: nn.Module) -> str:
    """The name by which `agr_jax.models.create` makes such a network.

    Raises:
        CheckpointError: if no published code names the layers of such a network.
    """
    variant = "_silu" if getattr(model, "silu", False) else ""
    if isinstance(model, models.PreActResNet) and tuple(model.blocks) == (2, 2, 2, 2):
        return f"preactresnet18{variant}"
    if isinstance(model, models.WideResNet):
        return f"wrn{model.depth}_{model.widen_factor}{variant}"
    raise CheckpointError(
        f"PyTorch's names are known for PreActResNet with blocks (2, 2, 2, 2) and WideResNet, "
        f"not for {model.__class__.__name__} with blocks {getattr(model, 'blocks', None)}"
    )


def architecture(
    path: Path, shapes: Mapping[str, tuple[int, ...]], note: str
) -> tuple[str, int, int, int]:
    """Name, width, number of classes and input channels, from the names and shapes."""

    def shape_of(tensor: str, axes: str) -> tuple[int, ...]:
        if tensor not in shapes:
            raise CheckpointError(
                f"{path}: missing tensor {tensor!r}{note}; it holds {listed(shapes)}"
            )
        shape = shapes[tensor]
        if len(shape) != axes.count(",") + 1 or 0 in shape:
            raise CheckpointError(f"{path}: {tensor!r} has shape {shape}, expected ({axes}){note}")
        return shape

    def has(prefix: str) -> bool:
        return any(tensor.startswith(prefix) for tensor in shapes)

    family = next((name for name, start in _STARTS.items() if has(start)), None)
    if family is None:
        raise CheckpointError(
            f"{path}: neither a PreAct-ResNet-18 ('layer1.0.conv1.weight', ..., or, with SiLU, "
            f"'layer_0.0.conv_2d_1.weight', ...) nor a WideResNet ('block1.layer.0.conv1.weight', "
            f"..., or 'layer.0.block.0.conv_0.weight', ...){note}; it holds {listed(shapes)}"
        )
    first = layer_name("conv1", family) + ".weight"
    width, channels = shape_of(first, "width, channels, 3, 3")[:2]
    name, last = family, "linear"
    if family.startswith("wrn"):
        second = layer_name("block1_0.conv1", family) + ".weight"
        widened = shape_of(second, "width * widen factor, width, 3, 3")[0]
        if widened % width:
            raise CheckpointError(
                f"{path}: {second!r} has {widened} outputs, expected a multiple of the width of "
                f"{first!r}, {width}{note}"
            )
        start = re.escape(_STARTS[family])
        matches = (re.match(rf"{start}(\d+)\.", tensor) for tensor in shapes)
        blocks = len({match[1] for match in matches if match})
        name = family.replace("wrn", f"wrn{6 * blocks + 4}_{widened // width}")
        last = "fc"
    classes = shape_of(layer_name(last, family) + ".weight", "classes, features")[0]
    return name, width, classes, channels


def listed(names: Iterable[str]) -> str:
    """The first names, quoted, and how many more there are."""
    names = sorted(names)
    shown = ", ".join(map(repr, names[:NAMES_SHOWN])) or "nothing"
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
