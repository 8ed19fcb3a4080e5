"""Where a run goes on from: its own latest checkpoint, the run it branches from, or the start."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agr_jax import checkpoints, mesh
from agr_jax.checkpoints import Checkpoints
from agr_jax.config import Config
from agr_jax.errors import ConfigError
from agr_jax.metrics import EpochMeter
from agr_jax.train_step import Trainer, TrainState


def restore_or_branch(
    config: Config,
    folder: Path,
    trainer: Trainer,
    *,
    fresh: TrainState,
    expected: dict[str, Any],
    saved: Checkpoints,
) -> tuple[TrainState, EpochMeter]:
    """The state to go on from: this run's latest checkpoint, its base's, or the fresh one.

    Args:
        config: settings of the run.
        folder: the run folder.
        trainer: of the run.
        fresh: the state at the start.
        expected: what a checkpoint must say about its model and data set.
        saved: the run's own checkpoints.

    Returns:
        The state, and the metrics of the epoch so far.

    Raises:
        CheckpointError: if the checkpoint is damaged or of another model, data set or training.
        ConfigError: if the checkpoint has done as many epochs as were asked for.
    """
    resumed = saved.latest_step() is not None
    if resumed:
        source = checkpoints.find(folder)
    elif config.init_from:
        source = checkpoints.find(Path(config.init_from))
    else:
        return fresh, EpochMeter()
    about = checkpoints.read_about(source)
    expected = {**expected, "training": training_description(config, trainer)}
    checkpoints.check_same(about, expected, source)
    step = about["step"]
    last_step = config.epochs * trainer.steps_per_epoch
    if not resumed and step >= last_step:
        raise ConfigError(
            f"config.epochs: {source} has done {about['epoch']} epochs already; "
            f"a branch needs more than these, got {config.epochs}"
        )
    if step > last_step:
        raise ConfigError(
            f"config.epochs: {folder} has done {about['epoch']} epochs already, got {config.epochs}"
        )
    variables = checkpoints.restore(source, "variables", fresh.variables)
    state = dataclasses.replace(
        fresh,
        step=jax.device_put(jnp.asarray(step, jnp.int32), mesh.replicated(trainer.on)),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=checkpoints.restore(source, "optimizer", fresh.opt_state),
    )
    if trainer.average_decay:
        # The average of a branch begins at its base where the base kept none.
        has_average = (source / "average").is_dir()
        average = checkpoints.restore(
            source, "average" if has_average else "variables", fresh.variables
        )
        state = dataclasses.replace(state, average=average)
    print(f"going on from {source}, step {step}", flush=True)
    return state, EpochMeter.from_dict(about["epoch_so_far"]) if resumed else EpochMeter()


def training_description(config: Config, trainer: Trainer) -> dict[str, Any]:
    """What a branch must share with its base for its step count and statistics to mean the same."""
    return {"batch_stats": config.batch_stats, "steps_per_epoch": trainer.steps_per_epoch}
