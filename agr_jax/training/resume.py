"""Where a run resumes: at its own latest checkpoint, at its base's if it is a branch, or afresh."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from agr_jax import distributed, sharding
from agr_jax.errors import ConfigError
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.checkpoints import Checkpoints
from agr_jax.training.meter import EpochMeter
from agr_jax.training.step import Trainer, TrainState


def resume_or_branch(
    run: Run, trainer: Trainer, *, fresh: TrainState, saved: Checkpoints
) -> tuple[TrainState, EpochMeter]:
    """The state to resume from: this run's latest checkpoint, its base's, or the fresh one.

    Args:
        run: whose `config.init_from` names the base.
        trainer: of the run.
        fresh: the state at the start.
        saved: the run's own checkpoints.

    Returns:
        The state, and the metrics of the epoch so far.

    Raises:
        CheckpointError: if the checkpoint is damaged or of another model, data set or training.
        ConfigError: if the checkpoint has done as many epochs as were asked for.
    """
    config, folder = run.config, run.folder
    resumed = saved.latest_step() is not None
    if resumed:
        source = checkpoints.find(folder)
    elif config.init_from:
        source = checkpoints.find(Path(config.init_from))
    else:
        return fresh, EpochMeter()
    about = checkpoints.read_about(source)
    checkpoints.check_same(about, description(run, trainer), source)
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
        step=sharding.put(np.int32(step), sharding.replicated(trainer.mesh)),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=checkpoints.restore(source, "optimizer", fresh.opt_state),
    )
    if trainer.average_decay:
        # The average of a branch begins at its base where the base kept none.
        has_average = distributed.from_first((source / "average").is_dir)
        average = checkpoints.restore(
            source, "average" if has_average else "variables", fresh.variables
        )
        state = dataclasses.replace(state, average=average)
    distributed.say(f"resuming from {source}, step {step}")
    return state, EpochMeter.from_dict(about["epoch_so_far"]) if resumed else EpochMeter()


def description(run: Run, trainer: Trainer) -> dict[str, Any]:
    """What a branch must share with its base: model, data set, and what makes steps comparable."""
    training = {"batch_stats": trainer.batch_stats, "steps_per_epoch": trainer.steps_per_epoch}
    return {**run.description(), "training": training}
