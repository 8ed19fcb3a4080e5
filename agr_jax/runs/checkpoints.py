"""Checkpoints of a run, with Orbax: the latest, the best on a held-out split, and chosen ones.

A checkpoint has the items `variables` (`{"params", "batch_stats"}`, all that inference needs),
`optimizer` (the optax state), `about` (JSON: the model, the data set, the position in the run), and
`average` (the moving average of the variables) in runs that keep one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    CustomSteps,
    LatestN,
)

from agr_jax import distributed
from agr_jax.errors import CheckpointError

PyTree = Any
# What the best checkpoint is chosen by: accuracy on the held-out split, under attack, or, for a
# method without an attack, on clean images. A checkpoint holds the one of these that counts.
SELECTION_METRIC = "validation_robust_accuracy"
CLEAN_SELECTION_METRIC = "validation_clean_accuracy"


class Checkpoints:
    """The `checkpoints/` folder of a run. A context manager: leaving it waits for pending writes.

    Args:
        folder: made if missing.
        keep_steps: steps whose checkpoints are never deleted.
        select_best: keep the checkpoint with the highest metric too.
        metric: by which the best one is chosen, `SELECTION_METRIC` or `CLEAN_SELECTION_METRIC`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_steps: Iterable[int] = (),
        select_best: bool = False,
        metric: str = SELECTION_METRIC,
    ) -> None:
        self._metric = metric
        policies = [LatestN(1), CustomSteps(list(keep_steps))]
        if select_best:
            policies.append(
                BestN(get_metric_fn=_selection_metric, n=1, keep_checkpoints_without_metrics=False)
            )
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=_selection_metric if select_best else None,
                best_mode="max",
                cleanup_tmp_directories=True,  # what a kill left half-written
            ),
        )

    def save(
        self,
        step: int,
        *,
        variables: PyTree,
        optimizer: PyTree,
        about: Mapping[str, Any],
        average: PyTree | None = None,
        selection_metric: float | None = None,
    ) -> None:
        """Writes a checkpoint in the background; it counts only once it is whole.

        Raises:
            CheckpointError: if this one or the one before it cannot be written, as on a full disk.
        """
        if step == self.latest_step():
            return
        metrics = None if selection_metric is None else {self._metric: selection_metric}
        items: dict[str, Any] = {
            "variables": ocp.args.StandardSave(variables),
            "optimizer": ocp.args.StandardSave(optimizer),
            "about": ocp.args.JsonSave(dict(about)),
        }
        if average is not None:
            items["average"] = ocp.args.StandardSave(average)
        with self._writing():
            written = self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
        if not written:
            raise CheckpointError(
                f"{self.folder}: step {step} was not saved, for a later step stands here "
                f"({self._manager.latest_step()}); move what does not belong to this run away"
            )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, if any, after pending writes.

        Raises:
            CheckpointError: if a pending write failed.
        """
        self.wait()
        return distributed.from_first(self._latest_on_disk)

    def _latest_on_disk(self) -> int | None:
        steps = _whole_checkpoints(self.folder)
        return int(steps[-1].name) if steps else None

    def wait(self) -> None:
        """Waits until pending writes are on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for pending writes and frees the threads."""
        with self._writing():
            self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        # Orbax and tensorstore report a full disk as OSError or as ValueError.
        except (OSError, ValueError) as error:
            if distributed.is_about_lost_process(error):
                raise
            reason = str(getattr(error, "strerror", None) or error).splitlines()[0]
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({reason}); "
                "the ones before it are whole, and the same command resumes from the last"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def find(path: Path, which: str = "last") -> Path:
    """The checkpoint that a path means: itself, or one of a run folder.

    Of several processes that work together the first one looks.

    Args:
        path: a checkpoint (`RUN/checkpoints/STEP`) or a run folder.
        which: `"last"`, `"average"` (the last one, which must hold a moving average), or `"best"`
            by the held-out split.

    Raises:
        CheckpointError: if there is none.
    """
    return Path(distributed.from_first(lambda: str(_find(path, which))))


def _find(path: Path, which: str = "last") -> Path:
    if which == "average":
        last = _find(path)
        if not (last / "average").is_dir():
            raise CheckpointError(
                f"{last}: holds no moving average (--config.averaging.decay=0.999 keeps one)"
            )
        return last
    if _is_whole(path):
        return path.absolute()
    steps = _whole_checkpoints(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; give a run folder or one of its checkpoints/STEP"
        )
    if which == "last":
        return steps[-1].absolute()
    scored = [(score, step) for step in steps if (score := _score(step)) is not None]
    if not scored:
        raise CheckpointError(
            f"{path}: no best checkpoint: none was scored on held-out examples yet "
            "(--config.data.validation_examples=N holds some out)"
        )
    return max(scored, key=lambda pair: pair[0])[1].absolute()


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The JSON item of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            about = reader.restore(checkpoint / "about", args=ocp.args.JsonRestore())
    except Exception as error:  # Orbax raises bare exceptions on damaged files
        if distributed.is_about_lost_process(error):
            raise
        raise CheckpointError(f"{checkpoint}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{checkpoint}: cannot be read as a checkpoint: its 'about' is empty")
    return about


def restore(checkpoint: Path, item: str, like: PyTree) -> PyTree:
    """Reads an item that is a tree of arrays.

    Args:
        checkpoint: from `find`.
        item: `"variables"`, `"optimizer"` or `"average"`.
        like: tree of arrays or of `jax.ShapeDtypeStruct` with shardings; the result has its
            structure, shapes, dtypes and placement.

    Raises:
        CheckpointError: if the checkpoint does not hold such a tree.
    """

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            wanted = ocp.args.StandardRestore(jax.tree.map(abstract, like))
            return reader.restore(checkpoint / item, args=wanted)
    except Exception as error:  # Orbax raises bare exceptions on damaged files
        if distributed.is_about_lost_process(error):
            raise
        raise CheckpointError(
            f"{checkpoint}: its {item!r} are damaged or of another model or optimiser: "
            + str(error).split(" [tensorstore_spec")[0]
        ) from error


def check_same(about: Mapping[str, Any], expected: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses a checkpoint of another model or data set.

    Args:
        about: what the checkpoint says.
        expected: what this run says; the groups in it must be equal.
        checkpoint: for the message.

    Raises:
        CheckpointError: naming each field that differs.
    """
    for group, fields in expected.items():
        stored = about.get(group)
        if stored != fields:
            stored = stored if isinstance(stored, Mapping) else {}
            differing = [
                f"{name}: {stored.get(name)!r} there, {fields.get(name)!r} here"
                for name in sorted(stored.keys() | fields.keys())
                if stored.get(name) != fields.get(name)
            ]
            raise CheckpointError(
                f"{checkpoint} is a checkpoint of another {group} ({'; '.join(differing)})"
            )


def _is_whole(step: Path) -> bool:
    """Orbax renames a checkpoint to its number once everything in it is written."""
    return step.name.isdecimal() and (step / "about").is_dir()


def _whole_checkpoints(folder: Path) -> list[Path]:
    """All of a folder's checkpoints, by step."""
    return sorted(filter(_is_whole, folder.glob("*")), key=lambda step: int(step.name))


def _selection_metric(metrics: Any) -> float:
    """Higher is better.

    Runs without an attack have checkpoints of an earlier version that were scored under attack:
    beside a clean accuracy these count least.
    """
    if CLEAN_SELECTION_METRIC in metrics:
        return 1 + float(metrics[CLEAN_SELECTION_METRIC])
    return float(metrics[SELECTION_METRIC])


def _score(step: Path) -> float | None:
    try:
        return _selection_metric(json.loads((step / "metrics" / "metrics").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None
