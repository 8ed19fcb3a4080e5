"""Weights in and out of PyTorch: files whose tensors have PyTorch's names and layouts.

`load_torch_weights` makes a classifier to attack from a network that PyTorch trained, and
`save_torch_weights` writes one that PyTorch's `load_state_dict(strict=True)` takes. A file ends in
`.safetensors` (with the extra `torch`) or `.npz`. Pickled files (`.pt`, `.pth`) are never read.

Names are those of the published networks: the PreAct-ResNet-18 of the AGR code and of RobustBench
(there with `bn_before_fc=True, out_shortcut=True`), TRADES' and RobustBench's WideResNet, and the
SiLU variants of both, Gowal et al.'s (RobustBench's DMPreActResNet of depth 18 and DMWideResNet).

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax import interop, models
    >>> model = models.create("wrn10_1", num_classes=10, width=4, mean=(0.5,), std=(0.25,))
    >>> variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros([1, 8, 8, 3]))
    >>> interop.save_torch_weights("weights.npz", model, variables)
    >>> classifier = interop.load_torch_weights("weights.npz")
    >>> jax.jit(classifier)(jnp.zeros([2, 8, 8, 3])).shape, classifier.model.mean
    ((2, 10), (0.5,))
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import models
from agr_jax.errors import CheckpointError
from agr_jax.interop import torch_names, weight_files
from agr_jax.interop.torch_names import NAMES_SHOWN, listed
from agr_jax.interop.weight_files import About
from agr_jax.models.convolution import Implementation
from agr_jax.models.layers import as_numbers, per_channel

_LAYOUTS = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}  # ours to PyTorch's, by the number of axes
# What RobustBench's networks and its ImageNormalizer call the buffers of their normalisation.
_MEANS, _STDS = ("mean", "mu"), ("std", "sigma")
_DING2020MMA = ("wrn28_4", 16)  # name and width
_UNUSED = "sub_block1."  # TRADES' WideResNet has this stage, and no forward pass goes through it


def load_torch_weights(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    normalisation: Literal["fixed", "per_image"] | None = None,
    conv: Implementation | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> models.Classifier:
    """Makes a classifier from a file of PyTorch-named weights.

    The architecture is read from the names and shapes of the tensors: PreAct-ResNet-18 or a
    WideResNet, its depth, widen factor, width, number of classes and of input channels. A prefix
    that all names share is taken off (`module.` of `DataParallel`, `model.`, the `1.` of a
    `Sequential` of normalisation and network). `num_batches_tracked` is ignored, and so is
    `sub_block1`, a stage of TRADES' WideResNet that no image goes through. The last layer of a
    WideResNet may be called `linear` (the AGR code) instead of `fc`.

    Two networks with the same names and shapes cannot be told apart. Of what RobustBench evaluates
    that is Ding2020MMA, a WideResNet-28-4 that standardises each image by its own mean and standard
    deviation: no network here does, so that a file of this size that says nothing of itself needs
    `normalisation="fixed"`. Its class PreActResNet can also be made with `PreActBlock`,
    `bn_before_fc=True` and `out_shortcut=False`, another forward pass than this library's. The
    names of Gowal et al. are taken for SiLU (`activation_fn=Swish` or `nn.SiLU`, as all such
    networks of RobustBench for CIFAR have it) without `padding=`.

    Args:
        path: a `.safetensors` or `.npz` file. Convolutions `[out, in, k, k]`, linear layers
            `[out, in]`, statistics `running_mean` and `running_var`, in float16, float32, float64
            or (safetensors only) bfloat16.
        name: `"preactresnet18"` or `"wrn<depth>_<widen factor>"`, or one of them with `"_silu"` at
            its end, for files that must hold this network and no other.
        mean: input mean per channel (or one for all), for images in [0, 1], subtracted inside the
            network. Required where the file does not say it, as most that PyTorch wrote; where it
            does, in its metadata or in buffers `mean` and `std` (or `mu` and `sigma`, as the
            `state_dict()` of some networks that RobustBench has loaded), the two must be equal. A
            network that computes `2 * x - 1` has a mean and std of 0.5.
        std: input standard deviation, as `mean`; at most 1.
        normalisation: `"fixed"` says that the network subtracts `mean` and divides by `std`, the
            same for all images. Required for a WideResNet-28-4 whose file does not say how it
            normalises. `"per_image"`, for one that standardises each image by its own statistics,
            is refused.
        conv: see `models.create`.
        dtype: dtype of the computation.
        param_dtype: dtype that the tensors are converted to.

    Returns:
        A function from images `[batch, height, width, channels]` in [0, 1] to logits
        `[batch, classes]`; its `model` and `variables` can be trained further.

    Raises:
        CheckpointError: if the file is missing, damaged, pickled or of an unknown kind; if tensors
            are missing, unexpected, of wrong shapes, not finite or not floating point; if they
            are not those of `name`; or if the normalisation is unknown, contradictory, not one for
            these channels, or not one of images in [0, 1].

    Example:
        >>> classifier = load_torch_weights("wrn34_10.safetensors", mean=(0,), std=(1,))
        ...                                                                 # doctest: +SKIP
        >>> pgd(Linf(8 / 255), steps=20)(classifier, images, labels, key)   # doctest: +SKIP
    """
    path = Path(path)
    found, about = weight_files.read(path)
    found, buffers = _without_normalisation(found)
    found, prefix = _with_plain_names(found)
    shapes = {tensor: value.shape for tensor, value in found.items()}
    note = f" (names without their prefix {prefix!r})" if prefix else ""

    inferred, width, num_classes, channels = torch_names.architecture(path, shapes, note)
    if name not in (None, inferred):
        raise CheckpointError(f"{path} holds the tensors of {inferred!r}, not of {name!r}{note}")
    if about is not None:
        said, read = (about.name, about.width, about.num_classes), (inferred, width, num_classes)
        if said != read:
            raise CheckpointError(
                f"{path}: its metadata say {_describe(*said)}, its tensors {_describe(*read)}"
            )
    model = models.create(
        inferred, num_classes, width=width, conv=conv, dtype=dtype, param_dtype=param_dtype
    )
    tree = _abstract_variables(model, channels)
    _check_shapes(
        f"{path} does not hold a {_describe(inferred, width, num_classes)}{note}",
        shapes,
        _torch_shapes(torch_names.by_tensor_name(tree, inferred)),
    )
    with np.errstate(over="ignore"):  # infinities are reported by name
        found = {tensor: value.astype(param_dtype, copy=False) for tensor, value in found.items()}
    _check_finite(path, found)
    known = buffers if about is None else (about.mean, about.std)
    _check_fixed(path, normalisation, inferred, width, says_it=known is not None)
    mean, std = _normalisation(path, known, mean, std, channels)

    def ours(leaf_path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = found[torch_names.tensor_name(leaf_path, inferred)]
        return jnp.asarray(np.ascontiguousarray(value.transpose(np.argsort(_layout(leaf)))))

    model = model.clone(mean=mean, std=std)
    return models.Classifier(model, jax.tree.map_with_path(ours, tree))


def save_torch_weights(
    path: str | os.PathLike[str], model: nn.Module, variables: Mapping[str, Any]
) -> None:
    """Writes variables as PyTorch-named weights, with the input normalisation in the metadata.

    PyTorch reads the `.safetensors` file with `safetensors.torch.load_file` and takes it with
    `load_state_dict(strict=True)`. Its network does not see the metadata: normalise the images by
    the `mean` and `std` of `model` there. The last layer of a WideResNet is called `fc` (the AGR
    code calls it `linear`; SiLU variants have names of their own). The file is written beside its
    place first, so that none is ever half there.

    Args:
        path: where to; the suffix, `.safetensors` or `.npz`, decides the format.
        model: PreAct-ResNet-18 or a WideResNet, or a SiLU variant, of any width and any number of
            classes.
        variables: `{"params": ..., "batch_stats": ...}` of this model. float64 stays float64;
            every other dtype is written as float32.

    Raises:
        CheckpointError: if the suffix is unknown or `safetensors` is not installed; if the model
            has no PyTorch names or the variables are not its own; if values are not finite; or if
            the file cannot be written.

    Example:
        >>> save_torch_weights("weights.safetensors", model, variables)     # doctest: +SKIP
    """
    path = Path(path)
    weight_files.check_writing(path)
    name = torch_names.network_name(model)
    if set(variables) != {"params", "batch_stats"}:
        raise CheckpointError(
            f"{path}: variables must be {{'params': ..., 'batch_stats': ...}}, "
            f"got {listed(variables)}"
        )
    leaves = torch_names.by_tensor_name(dict(variables), name)
    kernel = np.shape(leaves.get(torch_names.layer_name("conv1", name) + ".weight", ()))
    channels = kernel[2] if len(kernel) == 4 else 3
    mean, std = _normalisation(path, None, model.mean, model.std, channels)
    tree = _abstract_variables(model, channels)
    _check_shapes(
        f"{path}: the variables are not those of this {name!r}",
        _torch_shapes(leaves),
        _torch_shapes(torch_names.by_tensor_name(tree, name)),
    )
    tensors = {tensor: to_torch(leaf) for tensor, leaf in leaves.items()}
    _check_finite(path, tensors)
    for tensor in [tensor for tensor in tensors if tensor.endswith("running_mean")]:
        tensors[tensor.replace("running_mean", weight_files.COUNTER)] = np.zeros((), np.int64)
    weight_files.write(path, tensors, About(name, model.width, model.num_classes, mean, std))


# ---- layouts and names


def _layout(leaf: Any) -> tuple[int, ...]:
    """Our axes in PyTorch's order."""
    return _LAYOUTS.get(len(np.shape(leaf)), tuple(range(len(np.shape(leaf)))))


def _torch_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        tensor: tuple(np.shape(leaf)[axis] for axis in _layout(leaf))
        for tensor, leaf in leaves.items()
    }


def to_torch(leaf: Any) -> np.ndarray:
    """A leaf in PyTorch's layout; safetensors 0.8 writes other numbers for strided arrays."""
    value = np.asarray(leaf)
    value = value.astype(np.float64 if value.dtype == np.float64 else np.float32, copy=False)
    return np.ascontiguousarray(value.transpose(_layout(value)))


def _abstract_variables(model: nn.Module, channels: int) -> Any:
    """Shapes and dtypes of a model's variables; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


def _with_plain_names(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], str]:
    """Takes off what all names start with, leaves `_UNUSED` out, and calls a WRN's last layer fc.

    Returns:
        The tensors, and the prefix that they had; no network here has one of its own.
    """
    prefix = ""
    while found and all("." in tensor for tensor in found):
        first, *others = {tensor.partition(".")[0] + "." for tensor in found}
        if others:
            break
        prefix += first
        found = {tensor.removeprefix(first): value for tensor, value in found.items()}
    found = {tensor: value for tensor, value in found.items() if not tensor.startswith(_UNUSED)}
    if "block1.layer.0.conv1.weight" in found and "fc.weight" not in found:
        found = {re.sub(r"^linear\.", "fc.", tensor): value for tensor, value in found.items()}
    return found, prefix


def _without_normalisation(
    found: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], tuple[tuple[float, ...], tuple[float, ...]] | None]:
    """Takes out the buffers of a normalisation, if there is one: the others, (mean, std)."""

    def called(names: Sequence[str]) -> list[str]:
        return [tensor for tensor in found if tensor.rpartition(".")[2] in names]

    means, stds = called(_MEANS), called(_STDS)
    if len(means) != 1 or len(stds) != 1:
        return found, None
    mean, std = (tuple(map(float, found[tensor].ravel())) for tensor in (means[0], stds[0]))
    rest = {name: value for name, value in found.items() if name not in (means[0], stds[0])}
    return rest, (mean, std)


def _check_fixed(
    path: Path, normalisation: str | None, name: str, width: int, *, says_it: bool
) -> None:
    """Refuses networks that standardise each image, and what may be one of them."""
    if normalisation not in (None, "fixed", "per_image"):
        raise CheckpointError(
            f"{path}: normalisation must be 'fixed', 'per_image' or None, got {normalisation!r}"
        )
    if normalisation == "per_image":
        raise CheckpointError(
            f"{path}: normalisation='per_image': no network here standardises each image by its "
            "own mean and standard deviation"
        )
    if normalisation is None and (name, width) == _DING2020MMA and not says_it:
        raise CheckpointError(
            f"{path}: RobustBench's Ding2020MMA has the tensors of this WideResNet-28-4 and "
            "standardises each image by its own mean and standard deviation, which no network "
            "here does; if this file is another network, pass normalisation='fixed', mean= and "
            "std="
        )


def _normalisation(
    path: Path,
    known: tuple[tuple[float, ...], tuple[float, ...]] | None,
    mean: float | Sequence[float] | None,
    std: float | Sequence[float] | None,
    channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std, from the file or from the caller, checked."""
    agreed = []
    for index, (name, given) in enumerate((("mean", mean), ("std", std))):
        try:
            values = None if given is None else as_numbers(name, given)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
        said = None if known is None else known[index]
        if said is None and values is None:
            raise CheckpointError(
                f"{path}: normalisation does not travel in this file; pass mean= and std=, e.g. "
                f"{(0,) * channels}, {(1,) * channels} if the network normalises nothing, or 0.5 "
                "and 0.5 if it computes 2 * x - 1"
            )
        if said and values and not _equal(values, said):
            raise CheckpointError(
                f"{path}: {name}={values} was passed, the file says {said}; leave {name}= out"
            )
        values = values if said is None else said
        assert values is not None
        fine = len(values) in (1, channels) and all(map(math.isfinite, values))
        if not fine or (name == "std" and min(values) <= 0):
            positive = "positive and " if name == "std" else ""
            raise CheckpointError(
                f"{path}: {name} must be 1 or {channels} numbers, {positive}finite, got {values}"
            )
        try:
            agreed.append(per_channel(name, values))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return agreed[0], agreed[1]


def _equal(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    """To float32, in which buffers are kept; one number stands for all channels."""
    if len(values) != len(others) and 1 not in (len(values), len(others)):
        return False
    return np.allclose(values, others, rtol=1e-6, atol=0)


# ---- checks and messages


def _check_shapes(
    what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares names and shapes; one error says all that is wrong."""
    wrong = [
        f"{tensor!r} has shape {found[tensor]}, expected {shape}"
        for tensor, shape in expected.items()
        if tensor in found and found[tensor] != shape
    ]
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing tensors: {listed(missing)}")
    if unexpected := found.keys() - expected.keys():
        problems.append(f"unexpected tensors: {listed(unexpected)}")
    if wrong:
        more = f" and {len(wrong) - NAMES_SHOWN} more" if len(wrong) > NAMES_SHOWN else ""
        problems.append(", ".join(wrong[:NAMES_SHOWN]) + more)
    if problems:
        raise CheckpointError(f"{what}: {'; '.join(problems)}")


def _check_finite(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    bad = [tensor for tensor, value in tensors.items() if not np.isfinite(value).all()]
    if bad:
        raise CheckpointError(f"{path}: values that are NaN or infinite in {listed(bad)}")


def _describe(name: str, width: int, num_classes: int) -> str:
    return f"{name} of width {width} with {num_classes} classes"
