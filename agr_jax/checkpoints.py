"""Checkpoints of a run, with Orbax: the latest, the best on a held-out split, and chosen ones.

A checkpoint has three items: `variables` (`{"params", "batch_stats"}`, all that inference needs),
`optimizer` (the optax state), and `about` (JSON: the model, the data set, the position in the run).
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

from agr_jax.errors import CheckpointError

PyTree = Any
SELECTION_METRIC = "validation_robust_accuracy"


class Checkpoints:
    """The `checkpoints/` folder of a run. A context manager: leaving it waits for pending writes.

    Args:
        folder: made if missing.
        keep_steps: steps whose checkpoints are never deleted.
        select_best: keep the checkpoint with the highest `SELECTION_METRIC` too.
    """

    def __init__(
        self, folder: Path, *, keep_steps: Iterable[int] = (), select_best: bool = False
    ) -> None:
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
            ),
        )

    def save(
        self,
        step: int,
        *,
        variables: PyTree,
        optimizer: PyTree,
        about: Mapping[str, Any],
        selection_metric: float | None = None,
    ) -> None:
        """Writes a checkpoint in the background; it counts only once it is whole.

        Raises:
            CheckpointError: if this one or the one before it cannot be written, as on a full disk.
        """
        if step == self._manager.latest_step():
            return
        metrics = None if selection_metric is None else {SELECTION_METRIC: selection_metric}
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    variables=ocp.args.StandardSave(variables),
                    optimizer=ocp.args.StandardSave(optimizer),
                    about=ocp.args.JsonSave(dict(about)),
                ),
                metrics=metrics,
            )

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint, if any."""
        return self._manager.latest_step()

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
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({error.strerror or error}); "
                "the ones before it are whole, and the same command continues from the last"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def find(path: Path, which: str = "last") -> Path:
    """The checkpoint that a path means: itself, or the last or best one of a run folder.

    Args:
        path: a checkpoint (`RUN/checkpoints/STEP`) or a run folder.
        which: `"last"`, or `"best"` by the held-out split.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / "about").is_dir() and path.name.isdigit():
        return path.absolute()
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted(
        (
            child
            for child in folder.glob("*")
            if child.name.isdigit() and (child / "about").is_dir()
        ),
        key=lambda child: int(child.name),
    )
    if not steps:
        raise CheckpointError(
            f"{path}: no checkpoint here; give a run folder or one of its checkpoints/STEP"
        )
    if which == "last":
        return steps[-1].absolute()
    scored = [(score, step) for step in steps if (score := _score(step)) is not None]
    if not scored:
        raise CheckpointError(
            f"{path}: no best checkpoint: this run held no examples out "
            "(--config.data.validation_examples=N)"
        )
    return max(scored, key=lambda pair: pair[0])[1].absolute()


def read_about(checkpoint: Path) -> dict[str, Any]:
    """The JSON item of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        about = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(
            checkpoint / "about", args=ocp.args.JsonRestore()
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read as a checkpoint: {error}") from error
    return dict(about)


def restore(checkpoint: Path, item: str, like: PyTree) -> PyTree:
    """Reads `variables` or `optimizer`.

    Args:
        checkpoint: from `find`.
        item: `"variables"` or `"optimizer"`.
        like: tree of arrays or of `jax.ShapeDtypeStruct` with shardings; the result has its
            structure, shapes, dtypes and placement.

    Raises:
        CheckpointError: if the checkpoint does not hold such a tree.
    """

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    try:
        return ocp.Checkpointer(ocp.StandardCheckpointHandler()).restore(
            checkpoint / item, args=ocp.args.StandardRestore(jax.tree.map(abstract, like))
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint}: its {item!r} do not fit this model and optimiser: {error}"
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


def _selection_metric(metrics: Any) -> float:
    return float(metrics[SELECTION_METRIC])


def _score(step: Path) -> float | None:
    try:
        return float(json.loads((step / "metrics" / "metrics").read_text())[SELECTION_METRIC])
    except (OSError, ValueError, KeyError):
        return None
