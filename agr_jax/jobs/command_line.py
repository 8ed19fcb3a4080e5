"""The jobs of the command line: each takes what was asked for, and gives an exit status."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from agr_jax import config as config_module
from agr_jax import distributed, sharding
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


class Request(NamedTuple):
    """What the command line asks for.

    Attributes:
        values: of the config file with its flags; `None` without one.
        folder: `--workdir`.
        part: `--part` of a sweep.
    """

    values: Mapping[str, Any] | None
    folder: Path | None
    part: str | None = None


def train(request: Request) -> int:
    """Trains a run, or resumes it, and evaluates it."""
    config, folder = _one_run(request)
    return train_run(config, folder)


def evaluate(request: Request) -> int:
    """Evaluates the checkpoints of a run and prints its table."""
    config, folder = _one_run(request)
    check_same_run(
        folder,
        config,
        advice="an evaluation takes a run as it is; another ball is part of an attack's name, as "
        "in --config.eval.attacks=\"('pgd20@linf=16/255',)\"",
    )
    records = evaluate_run(Run.from_config(config, folder))
    distributed.say(f"{config.name}, {folder}\n\n{render_table(records)}")
    return 0


def measure(request: Request) -> int:
    """Measures on a run's last checkpoint what the paper's figures show."""
    config, folder = _one_run(request)
    check_same_run(folder, config)
    with locked(folder):
        run = Run.from_config(config, folder)
        for name in config.measure.names:
            measure_run(run, name)
            distributed.say(f"measured: {folder / MEASUREMENTS / name}.json")
    return 0


def make_runs(request: Request) -> int:
    """Makes the runs of a table or figure that are missing."""
    planned = sweep.from_plan(request.values or {}, request.folder)
    sharding.prepare_backend(deterministic=False)
    return sweep.run(planned, sweep.Part.from_flag(request.part))


def report(request: Request) -> int:
    """Renders the paper's tables and figures from the runs in a folder."""
    if request.folder is None:
        raise ConfigError("--workdir: give the folder that holds the run folders")
    for path in write_report(request.folder, request.folder / "report"):
        distributed.say(str(path))
    return 0


# Whether the images are the same is seen from their digests.
_MAY_DIFFER_BETWEEN_MACHINES = ("config.data.dir", "config.data.cache", "config.data.download")

JOBS: dict[str, Callable[[Request], int]] = {
    "train": train,
    "evaluate": evaluate,
    "measure": measure,
    "sweep": make_runs,
    "report": report,
}


def _one_run(request: Request) -> tuple[Config, Path]:
    values = request.values
    if request.part is not None:
        raise ConfigError("--part: shares the runs of --job=sweep, and nothing else")
    if values is not None and "sweep" in values:
        raise ConfigError("--config: this file lists many runs: use --job=sweep")
    config = from_config_dict(values or {})
    sharding.prepare_backend(deterministic=config.deterministic)
    folder = request.folder or default_folder(config)
    fields = _by_full_name("config", config_module.to_dict(config))
    for name in _MAY_DIFFER_BETWEEN_MACHINES:
        del fields[name]
    distributed.check_same(
        {"--workdir": str(folder), **fields}, "start all with the same line and files"
    )
    return config, folder


def _by_full_name(prefix: str, value: Any) -> dict[str, Any]:
    """The fields of nested dicts: `{"config.attack.norm": "Linf", ...}`."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, inner in value.items():
        found |= _by_full_name(f"{prefix}.{name}", inner)
    return found
