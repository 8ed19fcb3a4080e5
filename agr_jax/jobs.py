"""The jobs of the command line: each takes the config's values and a folder, and gives a status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agr_jax import evaluate, measure, mesh, run_folder, sweep, train
from agr_jax.config import Config, from_config_dict
from agr_jax.errors import ConfigError
from agr_jax.report import write_report

Values = Mapping[str, Any] | None


def train_run(values: Values, folder: Path | None) -> int:
    """Trains a run, or continues it, and evaluates it."""
    config, folder = _one_run(values, folder)
    return train.run(config, folder)


def evaluate_run(values: Values, folder: Path | None) -> int:
    """Evaluates the checkpoints of a run and prints its table."""
    config, folder = _one_run(values, folder)
    run_folder.check(
        folder,
        config,
        advice="an evaluation takes a run as it is; another ball is part of an attack's name, as "
        "in --config.eval.attacks=\"('pgd20@linf=16/255',)\"",
    )
    records = evaluate.evaluate_run(folder, config)
    print(f"{config.name}, {folder}\n\n{evaluate.table(records)}")
    return 0


def measure_run(values: Values, folder: Path | None) -> int:
    """Measures on a run's last checkpoint what the paper's figures show."""
    config, folder = _one_run(values, folder)
    run_folder.check(folder, config)
    with run_folder.locked(folder):
        for name in config.measure.names:
            measure.measure_run(folder, config, name)
            print(f"measured: {run_folder.measurements_path(folder) / name}.json", flush=True)
    return 0


def sweep_runs(values: Values, folder: Path | None) -> int:
    """Makes the runs of a table or figure that are missing."""
    planned = sweep.from_plan(values or {}, folder)
    mesh.prepare_backend(deterministic=False)
    return sweep.run(planned)


def report_runs(values: Values, folder: Path | None) -> int:
    """Renders the paper's tables and figures from the runs in a folder."""
    if folder is None:
        raise ConfigError("--workdir: give the folder that holds the run folders")
    for path in write_report(folder, folder / "report"):
        print(path)
    return 0


JOBS: dict[str, Callable[[Values, Path | None], int]] = {
    "train": train_run,
    "evaluate": evaluate_run,
    "measure": measure_run,
    "sweep": sweep_runs,
    "report": report_runs,
}


def _one_run(values: Values, folder: Path | None) -> tuple[Config, Path]:
    if values is not None and "sweep" in values:
        raise ConfigError("--config: this file lists many runs: use --job=sweep")
    config = from_config_dict(values or {})
    mesh.prepare_backend(deterministic=config.deterministic)
    return config, folder or run_folder.default_folder(config)
