"""What a report knows of runs: read from their folders, and nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agr_jax import diagnostics, methods
from agr_jax.attacks import named
from agr_jax.config import AveragingConfig, Config
from agr_jax.data.sources import TITLES
from agr_jax.errors import RunFolderError, UserError
from agr_jax.evaluation import record_files
from agr_jax.evaluation.packed_bits import decode_mask
from agr_jax.files import read_json_lines
from agr_jax.runs.folder import DIAGNOSTICS, EVALUATIONS, MEASUREMENTS, METRICS, read_config

ARM_TITLES = {
    "off": "",
    "agr": "+ AGR",
    "clip": "+ clip",
    "agr_no_gop": "+ AGR without GOP",
    "agr_no_clip": "+ AGR without clip",
    "mean": "+ mean of both",
    "best": "best recipe",
    "other": "+ other",
}


# (interpolation, GOP, clipped leaves: AGR's own, all or none) -> arm.
_ARMS = {
    ("cosine", True, "own"): "agr",
    ("cosine", True, "none"): "agr_no_clip",
    ("cosine", False, "own"): "agr_no_gop",
    ("mean", True, "own"): "mean",
    ("none", False, "all"): "clip",
}
# What a report needs of a measurement.
_FIELDS = {
    "boundary": {"steps", "images", "directions", "most_steps"},
    "landscape": {"images", "filter_normalised", "raw"},
    "mechanism": {"batches", "change"},
}


@dataclasses.dataclass(frozen=True)
class Found:
    """Accuracy under one attack.

    Attributes:
        accuracy: in [0, 1].
        examples: number of test images.
        correct: booleans `[examples]`, or `None` where a record does not hold them.
        source: file that it comes from.
        selection: which test images, such as `first 1000 of 10000`; empty for all of them.
    """

    accuracy: float
    examples: int
    correct: np.ndarray | None
    source: str
    selection: str = ""

    @property
    def images(self) -> str:
        """How many images, and, if they are not the first ones, that they were drawn."""
        return f"{self.examples:,}{' drawn' if 'drawn' in self.selection else ''}"


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """One run.

    Attributes:
        name: of its folder, relative to the folder of all runs.
        folder: its folder.
        config: its settings.
        metrics: one record an epoch.
        attacks: what its last epoch's evaluations found, by the attack's name, with the settings
            that the run's config gives that name.
        measurements: contents of `measurements/*.json`, by name.
        device: that its last epoch was evaluated on; nothing if there were several, or none.
    """

    name: str
    folder: Path
    config: Config
    metrics: list[dict[str, Any]]
    attacks: Mapping[str, Found]
    measurements: Mapping[str, dict[str, Any]]
    device: str = ""

    @property
    def epochs(self) -> int:
        """Epochs that were trained."""
        return max((record.get("epoch", 0) for record in self.metrics), default=0)

    @property
    def finished(self) -> bool:
        """Whether all epochs were trained."""
        return self.epochs >= self.config.epochs

    @property
    def base(self) -> str:
        """Name of the run that it branches from, or nothing."""
        path = Path(self.config.init_from)  # the run's folder, or one of its checkpoints
        return path.parents[1].name if path.parent.name == "checkpoints" else path.name

    @property
    def method(self) -> str:
        """The training method; AWP is one."""
        return "awp" if self.config.awp.enabled else self.config.method

    @property
    def arm(self) -> str:
        """How the gradients are combined, as `configs/paper/plans.py` names it."""
        agr = self.config.agr
        if self.config.averaging.decay:
            return "best" if self.config.profile == "best" else "other"
        if not agr.enabled:
            return "off"
        clipped = "own" if agr.clip in ("interpolated", "changed") else agr.clip
        parts = agr.interpolation, agr.gop, clipped
        if parts == ("fixed", True, "own"):
            return f"tau_{agr.tau:g}"
        return _ARMS.get(parts, "other")

    @property
    def title(self) -> str:
        """Of its row in a table."""
        method = methods.title(self.method)
        return f"{method} {arm_title(self.arm)}".strip()

    @property
    def setting(self) -> str:
        """What must be the same for two runs to stand in one table."""
        config = self.config
        width = f" of width {config.model.width}" if config.model.width else ""
        images = config.data.train_examples
        drawn = f", {images:,} training images" if images else ""
        return (
            f"{TITLES.get(config.data.name, config.data.name)}, {config.model.name}{width}"
            f"{drawn}, {config.epochs} epochs"
        )


def arm_title(arm: str) -> str:
    """How a table names an arm."""
    if arm.startswith("tau_"):
        return f"+ fixed tau {arm.removeprefix('tau_')}"
    return ARM_TITLES[arm]


def read_runs(root: Path) -> tuple[list[RunRecord], dict[str, str]]:
    """All runs below a folder, and what is wrong with those that cannot be used.

    Returns:
        The runs, by name; and for a damaged or foreign folder its name and the reason.

    Raises:
        RunFolderError: if there is no such folder.
    """
    if not root.is_dir():
        raise RunFolderError(f"{root}: expected a folder of runs, found none")
    runs: list[RunRecord] = []
    problems: dict[str, str] = {}
    for path in sorted(p for p in root.iterdir() if p.is_dir() and p.name != "report"):
        if path.name.startswith("."):
            continue
        try:
            runs.append(read_run(path))
        except (UserError, OSError) as error:
            problems[path.name] = str(error)
    for record in runs:
        for name, reason in _problems_within(record).items():
            problems[f"{record.name}/{name}"] = reason
    return runs, problems


def read_run(folder: Path) -> RunRecord:
    """One run.

    Raises:
        RunFolderError: if it is no run folder, or its config cannot be read.
    """
    config = read_config(folder)
    path = folder / METRICS
    metrics = read_json_lines(path) if path.is_file() else []
    last = max((record.get("epoch", 0) for record in metrics), default=0)
    attacks: dict[str, Found] = {}
    devices = set()
    for path in sorted((folder / EVALUATIONS).glob(f"{_which(config.averaging)}*.json")):
        record = _read_json(path)
        if record is None or record.get("epoch") != last:
            continue
        environment = record.get("environment")
        if isinstance(environment, dict):
            devices.add(str(environment.get("device", "")))
        for result in record_files.results(record, named.maker(config), {"epoch": last}):
            new = None if result.reason else _found(record, result.entry, path)
            # More images are better than fewer.
            if new is not None and new.examples >= getattr(attacks.get(result.name), "examples", 0):
                attacks[result.name] = new
    measurements = {}
    for path in sorted((folder / MEASUREMENTS).glob("*.json")):
        measured = _read_json(path)
        if measured is not None and not _unusable(path.stem, measured, last):
            measurements[path.stem] = measured
    device = devices.pop() if len(devices) == 1 else ""
    return RunRecord(folder.name, folder, config, metrics, attacks, measurements, device)


def read_diagnostics(record: RunRecord) -> diagnostics.LeafDiagnostics | None:
    """What AGR saw in each step, where the run has kept it."""
    if not (record.folder / DIAGNOSTICS).is_dir():
        return None
    try:
        return diagnostics.read(record.folder)
    except (UserError, OSError, ValueError):
        return None


def _found(record: dict[str, Any], found: Any, path: Path) -> Found | None:
    try:
        examples = int(record["examples"])
        correct = None
        if "correct_images" in found:
            correct = decode_mask(found["correct_images"], examples)
        selection = record_files.selection(record, path)
        return Found(float(found["accuracy"]), examples, correct, path.name, selection)
    except (KeyError, TypeError, ValueError):
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _problems_within(record: RunRecord) -> dict[str, str]:
    """Files of a run that cannot be read, or are of another epoch."""
    found = {}
    for folder in (
        record.folder / EVALUATIONS,
        record.folder / MEASUREMENTS,
    ):
        for path in sorted(folder.glob("*.json")):
            values = _read_json(path)
            if values is None:
                found[f"{folder.name}/{path.name}"] = "damaged: not JSON"
                continue
            problem = None
            used = path.stem.startswith(_which(record.config.averaging))
            if folder.name == "measurements" or used or path.stem.startswith("last"):
                problem = _unusable(path.stem, values, record.epochs)
            if problem:
                found[f"{folder.name}/{path.name}"] = problem
            elif folder.name == "evaluations" and used:
                for attack, reason in _other_evaluations(path, values, record).items():
                    found[f"{folder.name}/{path.name}: {attack}"] = reason
    return found


def _other_evaluations(path: Path, values: dict[str, Any], record: RunRecord) -> Mapping[str, str]:
    """Attacks that a file holds, but of another evaluation, with the reasons."""
    found = {}
    meant = named.maker(record.config)
    for group in (values, *record_files.earlier_groups(values)):
        for result in record_files.results(group, meant, {"epoch": record.epochs}):
            reason = result.reason
            if group is not values and isinstance(result.entry, Mapping):
                reason = str(result.entry.get("reason", reason))
            elif not reason and _found(values, result.entry, path) is None:
                reason = "damaged: its images cannot be read"
            if reason:
                found[result.name] = reason
    return found


def _which(config: AveragingConfig) -> str:
    """The checkpoint that stands for a run: with its moving average where one is kept."""
    return "average" if config.decay else "last"


def _unusable(name: str, values: Mapping[str, Any], epochs: int) -> str | None:
    """Why a report leaves a file alone, if it does."""
    if absent := sorted(_FIELDS.get(name, set()) - values.keys()):
        return f"damaged: without {', '.join(absent)}"
    if values.get("epoch") != epochs:
        return f"of epoch {values.get('epoch')}, while the run has {epochs}: not used"
    if name == "mechanism" and "by_leaf" in values:  # files of earlier versions have none
        by_leaf = values["by_leaf"]
        try:
            lengths = {len(by_leaf[part]) for part in ("names", "cosine", "projected")}
        except (KeyError, TypeError):
            lengths = set()
        if len(lengths) != 1:
            return "damaged: by_leaf needs names, cosine and projected of one length"
    return None
