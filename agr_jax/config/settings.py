"""The settings of a run as frozen dataclasses, made from an `ml_collections.ConfigDict`.

A config file holds numbers and strings only. `from_config_dict` turns it into `Config`, once, and
refuses with the field's full name, its value and what would be right. Each dataclass below
documents its fields; `configs/base.py` holds the paper's values.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from agr_jax.config.fields import OneOf, build, suggestion
from agr_jax.errors import ConfigError
from agr_jax.ranges import Range
from agr_jax.threat import NORMS

NonNegativeInt = Annotated[int, Range(0)]
PositiveInt = Annotated[int, Range(1)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
# What has a module of its own elsewhere, where tests compare these with what is there.
METHODS = ("at", "trades", "mart", "avmixup", "standard")
DATA_SETS = ("digits", "cifar10", "cifar100", "tiny_imagenet", "image_folder")
LINF_EPSILON = 8 / 255
"""Radius of `@linf` attacks in a run of another norm."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: `preactresnet18`, `wrn34_10`, any `wrn<depth>_<widen factor>`, each with `_silu` at
            its end for the variant of `agr_jax.models.create`, or `MODULE:FUNCTION` of
            your own, a function from a `Config`, the number of classes and the dtype to a Linen
            module, as in `examples/own_network.py`; which of the fields below it respects is up
            to it.
        width: channels of the first convolution; 0 for the published network's.
        mean: input mean per channel, subtracted inside the model.
        std: input standard deviation per channel.
        conv: `canonical`, `plain`, or `auto` for the faster one on the backend.
    """

    name: str
    width: NonNegativeInt
    mean: tuple[Share, ...]
    std: tuple[Positive, ...]
    conv: Literal["auto", "canonical", "plain"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are augmented.

    Attributes:
        name: data set; `image_folder` is a tree of your own, `train/CLASS/*` and `test/CLASS/*`;
            `MODULE:FUNCTION` is a function of your own, from a `Config` to an
            `agr_jax.data.Dataset`.
        dir: folder or archive to read; empty to search `TFDS_DATA_DIR`, `./data`, and
            `~/tensorflow_datasets`, and to download what is not there.
        image_size: side that images are resized to: of Tiny ImageNet 32 or 64 (0 for 32), of an
            image folder any; 0 for the other sets, which keep their own.
        subset_ok: accept a partial set; the run is labelled as such.
        train_examples: size of a class-balanced subset of the training set; 0 for all.
        validation_examples: training examples held out to select the best checkpoint; 0 for none.
        last_batch: `drop` an epoch's last, short batch, or `keep` it (one more compilation).
        crop_padding: zeros around an image before the random crop; 0 for no crop.
        flip: flip left and right at random.
        cutout: `devries`, `official` (the published code's) or `none`.
        cutout_size: side of the `devries` square.
        resize: of an image folder: `crop` the middle of what is longer, or `stretch`.
        download: fetch the official archive where it is not on this machine.
        cache: keep decoded images in the user's cache folder, so that the next start is quick.
        extra: `.npz` file of extra training images (`image`, `label`); empty for none. A compressed
            one is unpacked in the cache folder in any case.
        extra_fraction: share of each batch that comes from `extra`.
        device_budget_mb: megabytes of images that each device may hold; what needs more is
            streamed from the host. 0 for a share of the device's memory.
        picture: save a picture of the first batch, as the model sees it, in the run folder.
    """

    name: Annotated[str, OneOf(DATA_SETS)]
    dir: str
    image_size: NonNegativeInt
    subset_ok: bool
    train_examples: NonNegativeInt
    validation_examples: NonNegativeInt
    last_batch: Literal["drop", "keep"]
    crop_padding: NonNegativeInt
    flip: bool
    cutout: Literal["devries", "official", "none"]
    cutout_size: PositiveInt
    resize: Literal["crop", "stretch"] = "crop"
    download: bool = True
    cache: bool = True
    extra: str = ""
    extra_fraction: Annotated[float, Range(0, 1 - 1e-9)] = 0.0
    device_budget_mb: NonNegativeInt = 0
    picture: bool = True


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """The attack inside training.

    Attributes:
        norm: `linf`, `l2`, `l1`, or `MODULE:FUNCTION` of your own, a function from the radius to an
            `agr_jax.threat.ThreatModel`.
        epsilon: radius, in units of the [0, 1] range.
        step_size: length of one step.
        steps: number of steps.
        objective: what it raises: the `cross_entropy`, or `kl`, the divergence from the clean
            prediction, as TRADES.
        random_start: start at a random point of the ball.
        start_noise: without `random_start`, standard deviation of Gaussian noise on the image.
        box_every_step: clip to [0, 1] after every step, not only at the start and the end.
    """

    norm: Annotated[str, OneOf(tuple(NORMS))]
    epsilon: NonNegative
    step_size: Positive
    steps: PositiveInt
    objective: Literal["cross_entropy", "kl"]
    random_start: bool
    start_noise: NonNegative
    box_every_step: bool


@dataclasses.dataclass(frozen=True)
class TradesConfig:
    """TRADES.

    Attributes:
        beta: weight of the divergence, 1 / lambda.
    """

    beta: NonNegative


@dataclasses.dataclass(frozen=True)
class MartConfig:
    """MART.

    Attributes:
        beta: weight of the weighted divergence.
    """

    beta: NonNegative


@dataclasses.dataclass(frozen=True)
class AVmixupConfig:
    """AVmixup; see `agr_jax.methods.AVmixup`.

    Attributes:
        gamma: length of the vertex in units of the perturbation.
        clean_label: weight of the true class at the image, lambda_1.
        vertex_label: weight of the true class at the vertex, lambda_2.
        hard_labels: ignore both weights and use the labels as they are.
    """

    gamma: NonNegative
    clean_label: Share
    vertex_label: Share
    hard_labels: bool


@dataclasses.dataclass(frozen=True)
class AWPConfig:
    """Adversarial weight perturbation, on top of any method.

    Attributes:
        enabled: perturb the weights.
        gamma: length of the perturbation relative to the norm of a kernel.
        start_epoch: epoch (counted from 0) from which the weights are perturbed.
        clean_gradient_at: where the clean gradient is taken: `unperturbed` or `perturbed` weights.
    """

    enabled: bool
    gamma: NonNegative
    start_epoch: NonNegativeInt
    clean_gradient_at: Literal["unperturbed", "perturbed"]


@dataclasses.dataclass(frozen=True)
class AveragingConfig:
    """Exponential moving average of the parameters and of BatchNorm's statistics.

    Attributes:
        decay: share of the average that one step keeps; 0 for no average. Early steps keep less,
            `(1 + step) / (10 + step)`, so that the initialisation is forgotten. The held-out split
            then scores the average, and the best checkpoint is the best average.
    """

    decay: Annotated[float, Range(0, 1 - 1e-9)]


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
    gop_start_epoch: NonNegativeInt
    interpolation: Literal["cosine", "mean", "fixed", "none"]
    tau: Share
    gics_start_epoch: NonNegativeInt
    interpolate_negative: bool
    clip: Literal["changed", "interpolated", "all", "none"]
    clip_norm: Positive
    clip_start_epoch: Annotated[int, Range(-1)]
    granularity: Literal["leaf", "global"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """SGD.

    Attributes:
        learning_rate: at the start.
        momentum: as PyTorch's SGD.
        nesterov: use Nesterov's momentum.
        weight_decay: added to the gradient of every parameter, after AGR.
        clip_global_norm: largest norm of the whole gradient, after AGR and before weight decay; 0
            for no limit.
        schedule: `piecewise` (times `factor` at each milestone), `cosine` to 0, or `constant`.
        milestones: epochs at which the learning rate drops.
        factor: of each drop.
    """

    learning_rate: Positive
    momentum: Share
    nesterov: bool
    weight_decay: NonNegative
    clip_global_norm: NonNegative
    schedule: Literal["piecewise", "cosine", "constant"]
    milestones: tuple[NonNegativeInt, ...]
    factor: Share


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints are kept besides the latest and, with a held-out split, the best.

    Attributes:
        every_epochs: how often a checkpoint is written, besides every time that the held-out
            split is scored.
        keep_epochs: epochs after which the checkpoint is kept for good, to branch from.
    """

    every_epochs: PositiveInt
    keep_epochs: tuple[PositiveInt, ...]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """The row that is printed after training.

    Attributes:
        attacks: names such as `clean`, `pgd20`, `pgd20@l2`, `pgd20@linf=16/255`, `table1`; all are
            listed in `agr_jax.attacks.named`. `MODULE:FUNCTION` is a function of your own from a
            threat model to an attack.
        examples: number of test images, 0 for all: the first ones, or, where the test set is
            ordered by class as an image folder is, as many drawn with a seed that all runs share.
        batch_size: images per batch; changes the speed, not the result.
        step_size: of PGD in the run's ball; in others it is 2.5 epsilon over the steps.
        every_epochs: how often the held-out split is attacked with the training attack, which
            chooses the best checkpoint (a method without an attack: its clean accuracy does).
        checkpoints: of `last`, `best` and `average`, as far as the run has them.
        l2_epsilon: radius of `@l2` attacks, where the run's norm is another.
        l1_epsilon: radius of `@l1` attacks, where the run's norm is another.
    """

    attacks: tuple[str, ...]
    examples: NonNegativeInt
    batch_size: PositiveInt
    step_size: Positive
    every_epochs: PositiveInt
    checkpoints: tuple[Literal["last", "best", "average"], ...] = ("last", "best", "average")
    l2_epsilon: NonNegative = 128 / 255
    l1_epsilon: NonNegative = 2000 / 255

    def radii(self) -> dict[str, float]:
        """Radius by norm, where the run's norm is another."""
        return {"linf": LINF_EPSILON, "l2": self.l2_epsilon, "l1": self.l1_epsilon}


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """What `--job=measure` measures on the last checkpoint; see `agr_jax.measure`.

    Attributes:
        names: of `boundary`, `landscape` and `mechanism`.
        images: number of test images of `boundary` (correct ones) and of `landscape`, chosen as
            those of `eval.examples`.
        directions: random directions for each image of `boundary`.
        most_steps: of 1/255 along a direction.
        points: of the grid along a direction of the weights; an odd number has w itself.
        batches: training batches of `mechanism`, at least two.
    """

    names: tuple[Literal["boundary", "landscape", "mechanism"], ...] = ("boundary", "landscape")
    images: PositiveInt = 100
    directions: PositiveInt = 10
    most_steps: PositiveInt = 255
    points: PositiveInt = 21
    batches: Annotated[int, Range(2)] = 200


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of the training step; evaluation and AGR's reductions are always float32.

    Attributes:
        train: `float32`, `tf32` (float32 arrays, TF32 products), or `bfloat16` activations with
            float32 parameters and statistics.
    """

    train: Literal["float32", "tf32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of one run.

    Attributes:
        name: of the experiment; the default run folder is called after it.
        profile: `paper`, `official` or `best`: what the config file was asked for.
        method: `at`, `trades`, `mart`, `avmixup`, `standard`, or `MODULE:FUNCTION` of your own, a
            function from a `Config` to an `agr_jax.methods.Method`. AWP is a group of its own.
        seed: of initialisation, data order, augmentation and attacks.
        epochs: number of passes over the training set.
        batch_size: over all devices.
        accumulate: in so many parts each batch is attacked and differentiated, one after the other,
            for less memory; both gradients are averaged before AGR. See
            `agr_jax.methods.Accumulated`.
        label_smoothing: share of every cross-entropy's target spread evenly over all classes.
        batch_stats: which passes update BatchNorm's running statistics: `clean_then_adversarial`,
            `adversarial`, or `published`, the passes of AGR's published code, which count twice in
            MART and include the unmixed adversarial images in AVmixup.
        diagnostics: take the clean gradient in every epoch, also where no update uses it, and write
            what AGR measures on each leaf in each step to `diagnostics/`.
        init_from: run folder or checkpoint to branch from; empty for a fresh start.
        deterministic: make GPU kernels deterministic (slower).
    """

    name: str
    profile: Literal["paper", "official", "best"]
    method: Annotated[str, OneOf(METHODS)]
    seed: Annotated[int, Range(0, 2**31 - 1)]
    epochs: PositiveInt
    batch_size: PositiveInt
    label_smoothing: Annotated[float, Range(0, 1 - 1e-9)]
    batch_stats: Literal["clean_then_adversarial", "adversarial", "published"]
    diagnostics: bool
    init_from: str
    deterministic: bool
    model: ModelConfig
    data: DataConfig
    attack: AttackConfig
    trades: TradesConfig
    mart: MartConfig
    avmixup: AVmixupConfig
    awp: AWPConfig
    agr: AGRConfig
    averaging: AveragingConfig
    optimizer: OptimizerConfig
    checkpoints: CheckpointConfig
    eval: EvalConfig
    precision: PrecisionConfig
    measure: MeasureConfig = MeasureConfig()
    accumulate: PositiveInt = 1


def from_config_dict(values: Mapping[str, Any]) -> Config:
    """Checks a config and freezes it.

    Args:
        values: an `ml_collections.ConfigDict`, or nested dicts such as a run's `config.json`.

    Raises:
        ConfigError: on an unknown or missing field, a wrong type, or a value out of range.
    """
    return build(Config, values, "config")


def check_field_name(name: str) -> None:
    """Checks a field's full name, such as `config.agr.tau`.

    Raises:
        ConfigError: if there is no such field, naming the nearest one.
    """
    cls: Any = Config
    prefix = "config"
    for part in name.removeprefix("config.").split("."):
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        if part not in hints:
            raise ConfigError(f"{prefix}.{part}: no such field{suggestion(part, hints)}")
        cls, prefix = hints[part], f"{prefix}.{part}"


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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
