"""The folder of one run: its lock, its config, and where everything in it is stored.

`config.json`, `data.json` (what was read), `first_batch.png`, `metrics.jsonl`, `checkpoints/`,
`evaluations/*.json`, and `measurements/*.json` and `diagnostics/*.npz` where they were asked for.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agr_jax import config as config_module
from agr_jax import distributed
from agr_jax.config import Config
from agr_jax.errors import FolderInUseError, RunFolderError
from agr_jax.files import write_atomically

# Names of what is stored in a run folder.
CONFIG = "config.json"
DATA = "data.json"
PICTURE = "first_batch.png"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
EVALUATIONS = "evaluations"
MEASUREMENTS = "measurements"
DIAGNOSTICS = "diagnostics"

# A run may be continued with other values of these: they do not change what was trained so far.
_MAY_CHANGE = (
    "config.eval.",
    "config.checkpoints.",
    "config.measure.",
    *(f"config.data.{n}" for n in ("dir", "download", "cache", "device_budget_mb", "picture")),
)


def default_folder(config: Config) -> Path:
    """`runs/<name>`, where runs that differ in method, profile, AGR or seed do not collide."""
    parts = [config.name]
    method = config.method.partition(":")[0].rpartition(".")[2]
    for variant in (method, *(["awp"] if config.awp.enabled else [])):
        if variant != "at" and not config.name.endswith(variant):
            parts.append(variant)
    if config.profile != "paper":
        parts.append(config.profile)
    if not config.agr.enabled:
        parts.append("baseline")
    if config.init_from:
        parts.append(f"from-{Path(config.init_from).name}")
    if config.seed:
        parts.append(f"seed{config.seed}")
    return Path("runs") / "-".join(parts)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for this process; the system frees it however we end.

    Of several processes that work together the first one holds it for all.

    Raises:
        FolderInUseError: if another process holds it.
        RunFolderError: if it cannot be written, or is not one folder for all processes.
    """
    held: list[int] = []
    distributed.from_first(lambda: held.append(_lock(folder)))
    try:
        distributed.check_shared_folder(folder)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _lock(folder: Path) -> int:
    """An open file, locked until it is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunFolderError(f"run folder {folder}: cannot be written: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        owner = (folder / ".lock").read_text().strip() or "unknown"
        raise FolderInUseError(
            f"run folder {folder} is in use by another process ({owner}); "
            "wait for it, stop it, or give another --workdir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"pid {os.getpid()} on {platform.node()}\n".encode())
    return descriptor


@distributed.decided_by_first
def check_same_run(
    folder: Path,
    config: Config,
    *,
    advice: str = "give another --workdir, or the same settings to continue it",
) -> None:
    """Refuses a folder whose checkpoints belong to a run with other settings.

    Args:
        folder: the run folder.
        config: what is asked for.
        advice: how to go on, for the message.

    Raises:
        RunFolderError: naming the fields that differ.
    """
    if not _has_checkpoints(folder):
        return
    if not (folder / CONFIG).exists():
        raise RunFolderError(
            f"run folder {folder} has checkpoints but no config.json; give another --workdir"
        )
    theirs = config_module.to_dict(read_config(folder))
    differing = {
        name: values
        for name, values in config_module.differences(theirs, config_module.to_dict(config)).items()
        if not name.startswith(_MAY_CHANGE)
    }
    if config.optimizer.schedule != "cosine":  # whose rate depends on the last epoch
        differing.pop("config.epochs", None)
    if differing:
        listed = "; ".join(
            f"{name}: {old!r} there, {new!r} here" for name, (old, new) in differing.items()
        )
        raise RunFolderError(f"run folder {folder} holds another run ({listed}); {advice}")


@distributed.decided_by_first
def check_data(folder: Path, digests: Mapping[str, str]) -> None:
    """Refuses to continue a run with other images than it was trained on.

    Args:
        folder: the run folder.
        digests: of the data set as it was read, `Dataset.digests`.

    Raises:
        RunFolderError: naming the splits that differ.
    """
    if not (_has_checkpoints(folder) and (folder / DATA).is_file()):
        return
    try:
        record = json.loads((folder / DATA).read_text(encoding="utf-8"))
        theirs, source = record.get("digests", {}), record["source"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RunFolderError(
            f"{folder / DATA} cannot be read ({error!r}); without the file the run goes on, "
            "and nobody compares its images"
        ) from error
    differing = [name for name in digests if name in theirs and theirs[name] != digests[name]]
    if differing:
        raise RunFolderError(
            f"run folder {folder} was trained on other images (from {source}; "
            f"{' and '.join(differing)} differ): give its images with --config.data.dir, or "
            "another --workdir. The same JPEG files decoded by another version of Pillow differ too"
        )


def _has_checkpoints(folder: Path) -> bool:
    saved = folder / CHECKPOINTS
    return saved.is_dir() and any(child.name.isdecimal() for child in saved.iterdir())


def write_config(folder: Path, config: Config) -> None:
    """Writes `config.json`."""
    text = json.dumps(config_module.to_dict(config), indent=2) + "\n"
    write_atomically(folder / CONFIG, text)


def write_data_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `data.json`: sources, sizes, digests and splits of what a run trains on."""
    write_atomically(folder / DATA, json.dumps(record, indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """The config of a run.

    Raises:
        RunFolderError: if the folder is no run, or its config cannot be read.
        ConfigError: if a field in it is not understood.
    """
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(f"{folder} is no run folder: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / CONFIG} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RunFolderError(f"{folder / CONFIG} cannot be read: it holds no fields")
    return config_module.from_config_dict(values)
