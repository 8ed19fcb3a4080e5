"""PreAct-ResNet-18 with the golden weights, and its parameters by their PyTorch names.

The recipe is that of `golden/README.md`: float64 draws of one NumPy generator, cast to float32,
over PyTorch's state_dict in order. PyTorch keeps convolutions as (out, in, height, width) and
linear layers as (out, in); the library as (height, width, in, out) and (in, out).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_STATISTICS = {"running_mean": "mean", "running_var": "var"}
_BLOCKS = [(stage, block) for stage in range(1, 5) for block in range(2)]


def state_dict_shapes(num_classes: int = 10, width: int = 64) -> Iterator[tuple[str, tuple]]:
    """PyTorch names and shapes, in the order of the state_dict, without `num_batches_tracked`."""

    def norm(name: str, channels: int) -> Iterator[tuple[str, tuple]]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (channels,)

    yield "conv1.weight", (width, 3, 3, 3)
    inputs = width
    for stage, block in _BLOCKS:
        name, outputs = f"layer{stage}.{block}", width * 2 ** (stage - 1)
        yield from norm(f"{name}.bn1", inputs)
        yield f"{name}.conv1.weight", (outputs, inputs, 3, 3)
        yield from norm(f"{name}.bn2", outputs)
        yield f"{name}.conv2.weight", (outputs, outputs, 3, 3)
        if inputs != outputs:
            yield f"{name}.shortcut.0.weight", (outputs, inputs, 1, 1)
        inputs = outputs
    yield from norm("bn", inputs)
    yield "linear.weight", (num_classes, inputs)
    yield "linear.bias", (num_classes,)


def draw(seed: int, lin_gain: float) -> dict[str, np.ndarray]:
    """The golden weights as a PyTorch state_dict, float32."""
    rs = np.random.RandomState(seed)
    state_dict = {}
    for name, shape in state_dict_shapes():
        if len(shape) == 4:
            value = rs.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif len(shape) == 2:
            value = rs.standard_normal(shape) * (lin_gain * np.sqrt(1 / shape[1]))
        elif name.endswith("bias") or name.endswith("running_mean"):
            value = 0.1 * rs.standard_normal(shape)
        else:
            value = rs.uniform(0.8, 1.2, shape)
        state_dict[name] = value.astype(np.float32)
    return state_dict


def path_of(torch_name: str) -> tuple[str, ...]:
    """Where a PyTorch entry lies in our tree, its collection first."""
    *modules, part = torch_name.replace("shortcut.0", "shortcut").split(".")
    if modules[0].startswith("layer"):
        modules[:2] = [f"{modules[0]}_{modules[1]}"]
    if part in _STATISTICS:
        return "batch_stats", *modules, _STATISTICS[part]
    if part == "weight":
        part = "scale" if "bn" in modules[-1] else "kernel"
    return "params", *modules, part


def torch_name_of(path: tuple[str, ...]) -> str:
    """The inverse of `path_of`."""
    _, *modules, part = path
    torch_part = {"scale": "weight", "kernel": "weight", "bias": "bias"}
    torch_part |= {ours: theirs for theirs, ours in _STATISTICS.items()}
    modules = [m.replace("_", ".") if m.startswith("layer") else m for m in modules]
    modules = ["shortcut.0" if m == "shortcut" else m for m in modules]
    return ".".join([*modules, torch_part[part]])


def to_variables(state_dict: Mapping[str, np.ndarray], dtype: Any) -> dict[str, Any]:
    """`{"params": ..., "batch_stats": ...}` of our network from a PyTorch state_dict."""
    variables: dict[str, Any] = {}
    for name, value in state_dict.items():
        *folders, leaf = path_of(name)
        tree = variables
        for folder in folders:
            tree = tree.setdefault(folder, {})
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[value.ndim]
        tree[leaf] = np.asarray(value.transpose(axes), dtype)
    return variables


def in_torch_layout(tree: Mapping[str, Any], torch_name: str) -> np.ndarray:
    """One leaf of a `params` or `batch_stats` tree, in PyTorch's layout."""
    value: Any = tree
    for folder in path_of(torch_name)[1:]:
        value = value[folder]
    value = np.asarray(value)
    return value.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[value.ndim])


def statistics(batch_stats: Mapping[str, Any], kind: str) -> np.ndarray:
    """All `running_mean` or `running_var`, concatenated in the order of the state_dict."""
    names = [name for name, _ in state_dict_shapes() if name.endswith(kind)]
    return np.concatenate([in_torch_layout(batch_stats, name) for name in names])
