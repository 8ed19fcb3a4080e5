"""Measures on a run's last checkpoint, and keeps the result in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from agr_jax.errors import ConfigError
from agr_jax.evaluation import record_files
from agr_jax.measure._boundary import boundary
from agr_jax.measure._landscape import landscape
from agr_jax.measure._mechanism import mechanism
from agr_jax.models import Classifier
from agr_jax.runs import Run, checkpoints
from agr_jax.runs.folder import MEASUREMENTS

_MEASUREMENTS: dict[str, Callable[[Run, Classifier], dict[str, Any]]] = {
    "boundary": boundary,
    "landscape": landscape,
    "mechanism": mechanism,
}


def measure_run(run: Run, name: str) -> dict[str, Any]:
    """Measures on a run's last checkpoint, and saves `measurements/<name>.json`.

    Args:
        run: whose `config.measure` says how much is measured.
        name: `boundary`, `landscape` or `mechanism`.

    Returns:
        What the JSON file holds.

    Raises:
        CheckpointError: if the run has no checkpoint, or one of another model or data set.
        ConfigError: on a name that is none.
    """
    if name not in _MEASUREMENTS:
        raise ConfigError(f"measurement {name!r}: there are {', '.join(_MEASUREMENTS)}")
    classifier, about = run.load_classifier(checkpoints.find(run.folder))
    with jax.default_matmul_precision("float32"):
        found = _MEASUREMENTS[name](run, classifier)
    record = {
        "measurement": name,
        "step": about["step"],
        "epoch": about["epoch"],
        "data": run.dataset.describe(),
        "seed": run.config.seed,
        **found,
        **run.provenance(),
    }
    path = run.folder / MEASUREMENTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    if earlier := _earlier(path, record):
        record["earlier"] = earlier
    record_files.write(path, record)
    return record


def _earlier(path: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a file has of other measurements, such as of another step: they stay in it."""
    stored = record_files.read(path)
    own = {name: value for name, value in stored.items() if name != "earlier"}
    earlier = record_files.earlier_groups(stored)
    is_other = any(own.get(name) != record[name] for name in ("step", "seed", "data"))
    settings = own.get("config")
    theirs = settings.get("measure") if isinstance(settings, dict) else None
    is_other = is_other or theirs != record["config"]["measure"]
    return [own, *earlier] if own and is_other else earlier
