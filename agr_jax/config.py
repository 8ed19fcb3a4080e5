"""The settings of a run as frozen dataclasses, made from an `ml_collections.ConfigDict`.

A config file holds numbers and strings only. `from_config_dict` turns it into `Config`, once, and
refuses with the field's full name, its value and what would be right. Each dataclass below
documents its fields; `configs/base.py` holds the paper's values.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from agr_jax.errors import ConfigError

T = TypeVar("T")


def _one_of(*choices: str) -> Any:
    return dataclasses.field(metadata={"choices": choices})


def _number(low: float = 0, high: float = float("inf"), *, above: bool = False) -> Any:
    """A field whose value (or values) lie in [low, high], or above low."""
    return dataclasses.field(metadata={"low": low, "high": high, "above": above})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: `preactresnet18`, `wrn34_10`, or any `wrn<depth>_<widen factor>`.
        width: channels of the first convolution; 0 for the published network's.
        mean: input mean per channel, subtracted inside the model.
        std: input standard deviation per channel.
        conv: `canonical`, `plain`, or `auto` for the faster one on the backend.
    """

    name: str
    width: int = _number(0)
    mean: tuple[float, ...] = _number(0, 1)
    std: tuple[float, ...] = _number(0, above=True)
    conv: str = _one_of("auto", "canonical", "plain")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are augmented.

    Attributes:
        name: data set.
        dir: folder or archive to read; empty to search `TFDS_DATA_DIR` and `./data`.
        image_size: side that Tiny ImageNet is resized to (32 or 64); 0 for the set's own.
        subset_ok: accept a partial set; the run is labelled as such.
        train_examples: size of a class-balanced subset of the training set; 0 for all.
        validation_examples: training examples held out to select the best checkpoint; 0 for none.
        last_batch: `drop` an epoch's last, short batch, or `keep` it (one more compilation).
        crop_padding: zeros around an image before the random crop; 0 for no crop.
        flip: flip left and right at random.
        cutout: `devries`, `official` (the published code's) or `none`.
        cutout_size: side of the `devries` square.
    """

    name: str = _one_of("digits", "cifar10", "cifar100", "tiny_imagenet")
    dir: str
    image_size: int = _number(0)
    subset_ok: bool
    train_examples: int = _number(0)
    validation_examples: int = _number(0)
    last_batch: str = _one_of("drop", "keep")
    crop_padding: int = _number(0)
    flip: bool
    cutout: str = _one_of("devries", "official", "none")
    cutout_size: int = _number(1)


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """The attack inside training.

    Attributes:
        norm: `linf`, `l2` or `l1`.
        epsilon: radius, in units of the [0, 1] range.
        step_size: length of one step.
        steps: number of steps.
        random_start: start at a random point of the ball.
        box_every_step: clip to [0, 1] after every step, not only at the start and the end.
    """

    norm: str = _one_of("linf", "l2", "l1")
    epsilon: float = _number(0)
    step_size: float = _number(0, above=True)
    steps: int = _number(1)
    random_start: bool
    box_every_step: bool


@dataclasses.dataclass(frozen=True)
class AGRConfig:
    """How the two gradients are combined; see `agr_jax.agr_transform`.

    Attributes:
        enabled: `False` is the baseline: the adversarial gradient alone.
        gop: project conflicting leaves.
        gop_start_epoch: epoch (counted from 0) from which GOP acts.
        interpolation: `cosine` (GICS), `mean`, `fixed` (with `tau`) or `none`.
        tau: share of the adversarial gradient with `fixed`.
        gics_start_epoch: epoch from which the interpolation acts.
        interpolate_negative: interpolate leaves of negative cosine too, while GOP does not act.
        clip: which leaves are clipped: `changed`, `interpolated`, `all` or `none`.
        clip_norm: largest norm of a clipped leaf.
        clip_start_epoch: epoch from which leaves are clipped; -1 for the earlier of the two starts.
        granularity: `leaf`, or `global` for the whole tree as one leaf.
    """

    enabled: bool
    gop: bool
    gop_start_epoch: int = _number(0)
    interpolation: str = _one_of("cosine", "mean", "fixed", "none")
    tau: float = _number(0, 1)
    gics_start_epoch: int = _number(0)
    interpolate_negative: bool
    clip: str = _one_of("changed", "interpolated", "all", "none")
    clip_norm: float = _number(0, above=True)
    clip_start_epoch: int = _number(-1)
    granularity: str = _one_of("leaf", "global")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD.

    Attributes:
        learning_rate: at the start.
        momentum: as PyTorch's SGD.
        nesterov: use Nesterov's momentum.
        weight_decay: added to the gradient of every parameter, after AGR.
        schedule: `piecewise` (times `factor` at each milestone), `cosine` to 0, or `constant`.
        milestones: epochs at which the learning rate drops.
        factor: of each drop.
    """

    learning_rate: float = _number(0, above=True)
    momentum: float = _number(0, 1)
    nesterov: bool
    weight_decay: float = _number(0)
    schedule: str = _one_of("piecewise", "cosine", "constant")
    milestones: tuple[int, ...] = _number(0)
    factor: float = _number(0, 1)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept besides the latest and, with a held-out split, the best.

    Attributes:
        every_epochs: how often a checkpoint is written.
        keep_epochs: epochs after which the checkpoint is kept for good, to branch from.
    """

    every_epochs: int = _number(1)
    keep_epochs: tuple[int, ...] = _number(1)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The row that is printed after training.

    Attributes:
        attacks: of `clean`, `fgsm` and `pgd<steps>`.
        examples: the first n images of the test set; 0 for all.
        batch_size: images per batch; changes the speed, not the result.
        step_size: of PGD.
        every_epochs: how often the held-out split is attacked with the training attack.
    """

    attacks: tuple[str, ...]
    examples: int = _number(0)
    batch_size: int = _number(1)
    step_size: float = _number(0, above=True)
    every_epochs: int = _number(1)


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of the training step; evaluation and AGR's reductions are always float32.

    Attributes:
        train: `float32`, `tf32` (float32 arrays, TF32 products), or `bfloat16` activations with
            float32 parameters and statistics.
    """

    train: str = _one_of("float32", "tf32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run.

    Attributes:
        name: of the experiment; the default run folder is called after it.
        profile: `paper`, `official` or `best`: what the config file was asked for.
        method: `at` or `standard`.
        seed: of initialisation, data order, augmentation and attacks.
        epochs: number of passes over the training set.
        batch_size: over all devices.
        batch_stats: which passes update BatchNorm's running statistics: `clean_then_adversarial` or
            `adversarial`.
        diagnostics: measure the cosine also in epochs that do not use the clean gradient.
        init_from: run folder or checkpoint to branch from; empty for a fresh start.
        deterministic: make GPU kernels deterministic (slower).
    """

    name: str
    profile: str = _one_of("paper", "official", "best")
    method: str = _one_of("at", "standard")
    seed: int = _number(0, 2**31 - 1)
    epochs: int = _number(1)
    batch_size: int = _number(1)
    batch_stats: str = _one_of("clean_then_adversarial", "adversarial")
    diagnostics: bool
    init_from: str
    deterministic: bool
    model: ModelConfig
    data: DataConfig
    attack: AttackConfig
    agr: AGRConfig
    optimizer: OptimizerConfig
    checkpoints: CheckpointConfig
    eval: EvalConfig
    precision: PrecisionConfig


def from_config_dict(values: Mapping[str, Any]) -> Config:
    """Checks a config and freezes it.

    Args:
        values: an `ml_collections.ConfigDict`, or nested dicts such as a run's `config.json`.

    Raises:
        ConfigError: on an unknown or missing field, a wrong type, or a value out of range.
    """
    return _build(Config, dict(values), "config")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested dicts, numbers, strings and lists, as `config.json` holds them."""
    return _plain(dataclasses.asdict(config))


def differences(
    left: Mapping[str, Any], right: Mapping[str, Any], prefix: str = "config"
) -> dict[str, tuple[Any, Any]]:
    """The fields in which two nested dicts differ: `{full name: (left value, right value)}`."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(left.keys() | right.keys()):
        a, b = left.get(name), right.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}.{name}")
        elif a != b:
            found[f"{prefix}.{name}"] = (a, b)
    return found


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise ConfigError(f"{prefix}.{name}: no such field{_suggestion(name, fields)}")
    for name in fields:
        if name not in values:
            raise ConfigError(f"{prefix}.{name}: the field is missing")
    hints = typing.get_type_hints(cls)
    built = {}
    for name, field in fields.items():
        value = _convert(values[name], hints[name], f"{prefix}.{name}")
        _check_range(value, field.metadata, f"{prefix}.{name}")
        built[name] = value
    return cls(**built)


def _convert(value: Any, hint: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{name}: must be a group of fields, got {value!r}")
        return _build(typing.cast(type, hint), dict(value.items()), name)
    if isinstance(hint, types.GenericAlias):
        element = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ConfigError(
                f"{name}: must be a tuple of {element.__name__} values, got {value!r}"
            )
        return tuple(_convert(v, element, f"{name}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{name}: must be {hint.__name__}, got {type(value).__name__} {value!r}")
    return value


def _check_range(value: Any, limits: Mapping[str, Any], name: str) -> None:
    if "choices" in limits and value not in limits["choices"]:
        choices = limits["choices"]
        raise ConfigError(
            f"{name}: must be one of {', '.join(choices)}, got {value!r}"
            + _suggestion(str(value), choices)
        )
    if "low" in limits:
        low, high, above = limits["low"], limits["high"], limits["above"]
        for number in value if isinstance(value, tuple) else (value,):
            if not low <= number <= high or (above and number == low):
                least = f"above {low}" if above else f"at least {low}"
                most = "" if high == float("inf") else f" and at most {high}"
                raise ConfigError(f"{name}: must be {least}{most}, got {number}")


def _suggestion(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
