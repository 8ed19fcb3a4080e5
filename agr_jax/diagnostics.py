"""What AGR measures on every parameter leaf in every step, on disk and back.

A run with `config.diagnostics` has a folder `diagnostics/` of `steps-<first>-<last>.npz` files, one
for each checkpoint that was saved.

Example:
    >>> from pathlib import Path
    >>> from agr_jax import diagnostics
    >>> measured = diagnostics.read(Path("runs/cifar10_at"))  # doctest: +SKIP
    >>> measured.cosine[:, measured.names.index("linear/kernel")]  # doctest: +SKIP
    >>> measured.projected.mean()  # GOP frequency  # doctest: +SKIP
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from agr_jax import distributed
from agr_jax.agr import MEASURED
from agr_jax.errors import RunFolderError
from agr_jax.files import write_atomically


class LeafDiagnostics(NamedTuple):
    """Measurements by step and leaf.

    Attributes:
        names: of the leaves, as `agr_jax.leaf_names` gives them.
        steps: `[steps]`, numbers counted from 1.
        cosine: float32 `[steps, leaves]`, between the clean and the adversarial gradient.
        projected: the same shape, 1 where GOP acted.
        clean_norm: the same shape, Euclidean norm of the clean gradient.
        adversarial_norm: the same shape, Euclidean norm of the adversarial gradient.
    """

    names: tuple[str, ...]
    steps: np.ndarray
    cosine: np.ndarray
    projected: np.ndarray
    clean_norm: np.ndarray
    adversarial_norm: np.ndarray


class DiagnosticsLog:
    """Collects the measurements of steps and writes them in files of whole arrays.

    Args:
        folder: `diagnostics/` of a run; made with the first file.
        names: of the leaves.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._folder, self._names = folder, tuple(names)
        self._steps: list[int] = []
        self._rows: list[list[np.ndarray]] = []

    def add(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Takes the `leaf_...` entries of a step's metrics."""
        self._steps.append(step)
        self._rows.append([np.asarray(metrics[f"leaf_{name}"]) for name in MEASURED])

    def write(self) -> None:
        """Puts what was added since the last time on disk."""
        if self._steps:
            columns = (np.stack(column) for column in zip(*self._rows, strict=True))
            _write(self._folder, LeafDiagnostics(self._names, np.asarray(self._steps), *columns))
        self._steps, self._rows = [], []

    def forget_after(self, step: int) -> None:
        """Drops later steps, which a resumed run repeats."""
        if not distributed.is_first():
            return
        for path in _files(self._folder):
            names, *arrays = _read(path)
            kept = arrays[0] <= step
            if not kept.all():
                if kept.any():
                    _write(self._folder, LeafDiagnostics(names, *(a[kept] for a in arrays)))
                path.unlink()  # afterwards: a kill loses nothing


def read(run: Path) -> LeafDiagnostics:
    """All measurements of a run.

    Args:
        run: the run folder.

    Raises:
        RunFolderError: if it has none, or a file of them is damaged.
    """
    files = _files(run / "diagnostics")
    if not files:
        raise RunFolderError(f"{run} has no diagnostics (--config.diagnostics=True writes them)")
    parts = [_read(path) for path in files]
    arrays = [np.concatenate(column) for column in list(zip(*parts, strict=True))[1:]]
    return LeafDiagnostics(parts[0].names, *arrays)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("steps-*-*.npz"))


def _write(folder: Path, measured: LeafDiagnostics) -> None:
    if not distributed.is_first():
        return
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        **{**measured._asdict(), "names": np.asarray(measured.names)},
    )
    path = folder / f"steps-{measured.steps[0]:09d}-{measured.steps[-1]:09d}.npz"
    write_atomically(path, buffer.getvalue())


def _read(path: Path) -> LeafDiagnostics:
    try:
        # numpy leaves a file that it opened itself open where it turns out to be damaged.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names = tuple(str(name) for name in file["names"])
            return LeafDiagnostics(names, file["steps"], *(file[name] for name in MEASURED))
    except Exception as error:  # numpy and zipfile raise several kinds on damaged files
        raise RunFolderError(f"{path} cannot be read: {error}") from error
