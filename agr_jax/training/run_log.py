"""What a run says: its plan, and each epoch as a line for a person and a record for a file."""

from __future__ import annotations

import resource
from typing import Any

import jax

from agr_jax import methods
from agr_jax.attacks._pgd import too_short
from agr_jax.config import Config
from agr_jax.data.feed import Feed
from agr_jax.runs import Run, checkpoints
from agr_jax.training import optimizers
from agr_jax.training.meter import EpochMeter
from agr_jax.training.step import Trainer, TrainState


def plan(run: Run, trainer: Trainer, state: TrainState, feed: Feed) -> str:
    """The lines before the first step."""
    config = run.config
    total = config.epochs * trainer.steps_per_epoch
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    device = trainer.mesh.devices.flat[0]
    gop, interpolation = optimizers.start_epochs(config.agr)
    agr = "off"
    if config.agr.enabled:
        agr = ", ".join(
            f"{name} {'never' if start is None else f'from epoch {start}'}"
            for name, start in (("GOP", gop), (f"{config.agr.interpolation} mix", interpolation))
        )
    devices = f"{trainer.mesh.size} x {device.device_kind}"
    lines = [
        f"{config.name} ({config.profile}): {config.method}, AGR {agr}",
        f"{config.model.name}, {count:,} parameters, on {devices}; steps {int(state.step)} to "
        f"{total}, {trainer.steps_per_epoch} an epoch; {feed.describe()}",
    ]
    return "\n".join([*lines, *cautions(config)])


def cautions(config: Config) -> list[str]:
    """What a config says that is seldom meant, each as a line with its field."""
    found = []
    epochs, milestones = config.epochs, config.optimizer.milestones
    if config.optimizer.schedule == "piecewise" and milestones and min(milestones) >= epochs:
        found.append(
            f"config.optimizer.milestones: of {milestones} none is reached in {epochs} epochs: the "
            "learning rate never drops"
        )
    agr, (gop, gics) = config.agr, optimizers.start_epochs(config.agr)
    starts = {
        "agr.gop_start_epoch": gop,
        "agr.gics_start_epoch": gics,
        "agr.clip_start_epoch": agr.clip_start_epoch
        if agr.enabled and agr.clip != "none"
        else None,
        "awp.start_epoch": config.awp.start_epoch if config.awp.enabled else None,
    }
    found += [
        f"config.{field}: {start} is not reached in {epochs} epochs: what begins there never acts"
        for field, start in starts.items()
        if start is not None and start >= epochs
    ]
    message = too_short(methods.training_attack(config.attack))
    if message and methods.from_config(config).is_adversarial:
        found.append(f"config.attack.step_size: {message}")
    return [f"caution: {each}" for each in found]


def epoch_record(
    run: Run, trainer: Trainer, epoch: int, meter: EpochMeter, scores: dict[str, float]
) -> dict[str, Any]:
    """One line of `metrics.jsonl`."""
    config, per_epoch = run.config, trainer.steps_per_epoch
    last_step = (epoch + 1) * per_epoch - 1
    learning_rate = optimizers.schedule_from_config(config.optimizer, config.epochs, per_epoch)(
        last_step
    )
    return {
        "step": last_step + 1,
        "epoch": epoch + 1,
        "learning_rate": float(learning_rate),
        "seconds": round(meter.seconds, 3),
        "images_per_second": round(meter.images / meter.seconds, 1),
        "peak_memory_mb": _peak_memory_mb(),
        **meter.means(),
        **scores,
    }


def epoch_line(run: Run, trainer: Trainer, record: dict[str, Any]) -> str:
    """A record as a line."""
    parts = [f"epoch {record['epoch']}/{run.config.epochs}"]
    shown = {
        "clean_loss": "clean loss {:.3f}",
        "adversarial_loss": "adversarial loss {:.3f}",
        "adversarial_accuracy": "training robust accuracy {:.1%}",
        checkpoints.CLEAN_SELECTION_METRIC: "held-out clean {:.1%}",
        checkpoints.SELECTION_METRIC: "robust {:.1%}",
        "projected": "projected {:.0%}",
        "images_per_second": "{:.0f} images/s",
    }
    if not trainer.method.is_adversarial:
        shown["adversarial_loss"] = "loss {:.3f}"
        shown["adversarial_accuracy"] = "training accuracy {:.1%}"
    parts += [text.format(record[name]) for name, text in shown.items() if name in record]
    return ", ".join(parts)


def _peak_memory_mb() -> float:
    """Of the first accelerator; on CPU of this process."""
    device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    if device.platform != "cpu" and "peak_bytes_in_use" in statistics:
        return round(statistics["peak_bytes_in_use"] / 1e6, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1)
