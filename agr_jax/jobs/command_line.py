"""The jobs of the command line: each takes the config's values and a folder, and gives a status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agr_jax import sharding
from agr_jax.config import Config, from_config_dict
from agr_jax.errors import ConfigError
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.evaluation.table import render_table
from agr_jax.jobs import sweep
from agr_jax.measure import measure_run
from agr_jax.report import write_report
from agr_jax.runs import Run
from agr_jax.runs.folder import MEASUREMENTS, check_same_run, default_folder, locked
from agr_jax.training import train_run

Values = Mapping[str, Any] | None


def train(values: Values, folder: Path | None) -> int:
    """Trains a run, or resumes it, and evaluates it."""
    config, folder = _one_run(values, folder)
    return train_run(config, folder)


def evaluate(values: Values, folder: Path | None) -> int:
    """Evaluates the checkpoints of a run and prints its table."""
    config, folder = _one_run(values, folder)
    check_same_run(
        folder,
        config,
        advice="an evaluation takes a run as it is; another ball is part of an attack's name, as "
        "in --config.eval.attacks=\"('pgd20@linf=16/255',)\"",
    )
    records = evaluate_run(Run.from_config(config, folder))
    print(f"{config.name}, {folder}\n\n{render_table(records)}")
    return 0


def measure(values: Values, folder: Path | None) -> int:
    """Measures on a run's last checkpoint what the paper's figures show."""
    config, folder = _one_run(values, folder)
    check_same_run(folder, config)
    with locked(folder):
        run = Run.from_config(config, folder)
        for name in config.measure.names:
            measure_run(run, name)
            print(f"measured: {folder / MEASUREMENTS / name}.json", flush=True)
    return 0


def make_runs(values: Values, folder: Path | None) -> int:
    """Makes the runs of a table or figure that are missing."""
    planned = sweep.from_plan(values or {}, folder)
    sharding.prepare_backend(deterministic=False)
    return sweep.run(planned)


def report(values: Values, folder: Path | None) -> int:
    """Renders the paper's tables and figures from the runs in a folder."""
    if folder is None:
        raise ConfigError("--workdir: give the folder that holds the run folders")
    for path in write_report(folder, folder / "report"):
        print(path)
    return 0


JOBS: dict[str, Callable[[Values, Path | None], int]] = {
    "train": train,
    "evaluate": evaluate,
    "measure": measure,
    "sweep": make_runs,
    "report": report,
}


def _one_run(values: Values, folder: Path | None) -> tuple[Config, Path]:
    if values is not None and "sweep" in values:
        raise ConfigError("--config: this file lists many runs: use --job=sweep")
    config = from_config_dict(values or {})
    sharding.prepare_backend(deterministic=config.deterministic)
    return config, folder or default_folder(config)
