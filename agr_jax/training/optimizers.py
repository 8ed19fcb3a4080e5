"""The optimiser of a run: AGR, then SGD in PyTorch's order, from a config."""

from __future__ import annotations

import optax

from agr_jax.agr import Interpolation, agr_transform
from agr_jax.config import AGRConfig, Config, OptimizerConfig
from agr_jax.errors import ConfigError


def from_config(config: Config, steps_per_epoch: int) -> optax.GradientTransformationExtraArgs:
    """AGR, global clip, weight decay, momentum, learning rate.

    AGR is in the chain of the baseline too, switched off: baseline and AGR share one checkpoint
    format, so either can branch from the other.

    Raises:
        ConfigError: if the AGR fields contradict each other.
    """
    optimizer = config.optimizer
    transforms = [agr_from_config(config.agr, steps_per_epoch)]
    if optimizer.clip_global_norm:
        transforms.append(optax.clip_by_global_norm(optimizer.clip_global_norm))
    if optimizer.weight_decay:
        transforms.append(optax.add_decayed_weights(optimizer.weight_decay))
    if optimizer.momentum:
        transforms.append(optax.trace(optimizer.momentum, nesterov=optimizer.nesterov))
    transforms.append(
        optax.scale_by_learning_rate(
            schedule_from_config(optimizer, config.epochs, steps_per_epoch)
        )
    )
    return optax.chain(*transforms)


def agr_from_config(
    config: AGRConfig, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """`agr_transform` with its starts in steps instead of epochs."""
    if not config.enabled:
        return agr_transform(gop_start=None, gics_start=None, clip_norm=None, clip="none")
    gop_epoch, gics_epoch = start_epochs(config)
    clip_epoch = None if config.clip_start_epoch < 0 else config.clip_start_epoch
    if config.clip == "all" and gop_epoch is gics_epoch is clip_epoch is None:
        raise ConfigError(
            "config.agr.clip_start_epoch: config.agr.clip=all without GOP and interpolation needs "
            f"the epoch from which to clip, got {config.clip_start_epoch}"
        )
    if config.interpolate_negative and config.interpolation not in ("mean", "fixed"):
        raise ConfigError(
            "config.agr.interpolate_negative: needs config.agr.interpolation=mean or fixed, got "
            f"{config.interpolation}"
        )
    interpolations: dict[str, Interpolation] = {
        "cosine": "cosine",
        "none": "cosine",
        "mean": "mean",
        "fixed": config.tau,
    }
    try:
        return agr_transform(
            gop_start=_steps(gop_epoch, steps_per_epoch),
            gics_start=_steps(gics_epoch, steps_per_epoch),
            interpolation=interpolations[config.interpolation],
            interpolate_negative=config.interpolate_negative,
            clip_norm=config.clip_norm,
            clip=config.clip,
            clip_start=_steps(clip_epoch, steps_per_epoch),
            granularity=config.granularity,
        )
    except ValueError as error:
        raise ConfigError(f"config.agr: {error}") from error


def start_epochs(config: AGRConfig) -> tuple[int | None, int | None]:
    """Epochs from which GOP and the interpolation act; `None` for never."""
    gop = config.gop_start_epoch if config.enabled and config.gop else None
    interpolated = config.enabled and config.interpolation != "none"
    return gop, config.gics_start_epoch if interpolated else None


def uses_clean_gradient(config: AGRConfig, epoch: int) -> bool:
    """Whether the update of an epoch depends on the clean gradient."""
    return any(start is not None and epoch >= start for start in start_epochs(config))


def schedule_from_config(
    config: OptimizerConfig, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """Learning rate by step.

    Raises:
        ConfigError: if the milestones do not rise.
    """
    if list(config.milestones) != sorted(set(config.milestones)):
        raise ConfigError(f"config.optimizer.milestones: must rise, got {config.milestones}")
    if config.schedule == "piecewise":
        return optax.piecewise_constant_schedule(
            config.learning_rate,
            {epoch * steps_per_epoch: config.factor for epoch in config.milestones},
        )
    if config.schedule == "cosine":
        return optax.cosine_decay_schedule(config.learning_rate, epochs * steps_per_epoch)
    return optax.constant_schedule(config.learning_rate)


def _steps(epoch: int | None, steps_per_epoch: int) -> int | None:
    return None if epoch is None else epoch * steps_per_epoch
