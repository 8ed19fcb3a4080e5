"""The batches of a long evaluation that are done, on disk: what a second start need not repeat.

Of several processes that work together the first one reads and writes, and tells the others.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import distributed
from agr_jax.errors import EvaluationStateError, OtherEvaluationError
from agr_jax.files import write_atomically


class BatchRecord(NamedTuple):
    """What one batch gave.

    Attributes:
        rows: integers `[n]`, which images.
        fooled: booleans `[n]`.
        predictions: integers `[n]`, at the attack's points.
        zero_gradients: integer, images whose loss had no gradient at the start, or a NaN one.
        seconds: that it took.
        points: `[fooled images, ...]`, of the images that were fooled.
    """

    rows: np.ndarray
    fooled: np.ndarray
    predictions: np.ndarray
    zero_gradients: np.ndarray
    seconds: np.ndarray
    points: np.ndarray

    @classmethod
    def of_mask(
        cls, rows: np.ndarray, fooled: np.ndarray, seconds: float, zero_gradients: int = 0
    ) -> BatchRecord:
        """Of an attack whose points are not kept."""
        nothing = np.zeros(0, np.int32)
        count = np.asarray(zero_gradients)
        return cls(rows, fooled, nothing, count, np.asarray(seconds), nothing)


class Journal:
    """One file for each batch, in a folder that names the evaluation it belongs to.

    An evaluation asks for its batches in the same order every time, so a batch is known by its
    number; what is asked for is compared with what is there.

    Args:
        folder: made if missing; `None` keeps nothing.
        identity: numbers and strings that say which evaluation this is.
        defaults: what entries of the identity count as where a folder, which is older than they
            are, does not have them.

    Raises:
        OtherEvaluationError: if the folder holds another evaluation.
        EvaluationStateError: if it cannot be read.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._folder, self._number = folder, 0
        if folder is not None:
            _open(folder, identity, defaults)

    def next(self, unit: str, rows: np.ndarray) -> BatchRecord | None:
        """The next batch if it is done, else `None`.

        Args:
            unit: which attack, and which of its runs.
            rows: the images.

        Raises:
            EvaluationStateError: if the file is damaged or of another batch.
        """
        if self._folder is None:
            return None
        path = self._path(unit)
        content = _content(path)
        if content is None:
            return None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                record = BatchRecord(*(file[name] for name in BatchRecord._fields))
        except Exception as error:  # numpy and zipfile raise several kinds on damaged files
            raise EvaluationStateError(
                f"{path} is damaged ({error}); delete it, and this batch is attacked again"
            ) from error
        if not np.array_equal(record.rows, rows):
            raise OtherEvaluationError(f"{path} is of other images; delete {self._folder}")
        self._number += 1
        return record

    def add(self, unit: str, record: BatchRecord) -> None:
        """Puts a batch on disk, whole."""
        if self._folder is not None:
            buffer = io.BytesIO()
            np.savez(buffer, **record._asdict())
            write_atomically(self._path(unit), buffer.getvalue())
        self._number += 1

    def _path(self, unit: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._number:06d}-{unit}.npz"


def _content(path: Path) -> bytes | None:
    """What a file holds, if there is one: as the first process sees it, in all."""
    read: list[bytes] = []

    def look() -> bool:
        try:
            read.append(path.read_bytes())
        except FileNotFoundError:
            return False
        return True

    return distributed.broadcast(b"".join(read)) if distributed.from_first(look) else None


@distributed.decided_by_first
def _open(folder: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Makes the folder, or compares whose it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "identity.json"
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            there = {**defaults, **found}
            differing = [name for name in identity if there.get(name) != identity[name]]
        except (ValueError, TypeError) as error:
            raise EvaluationStateError(
                f"{path} cannot be read ({error}); delete the folder {folder}"
            ) from error
        if differing:
            listed = "; ".join(
                f"{name}: {there.get(name)!r} there, {identity[name]!r} here" for name in differing
            )
            raise OtherEvaluationError(
                f"{folder} holds the progress of another evaluation ({listed}); delete it, or "
                "give another folder"
            )
    elif any(folder.glob("[0-9]*-*.npz")):
        raise OtherEvaluationError(
            f"{folder} holds batches, but no identity.json that says of which evaluation; "
            "delete the folder"
        )
    else:
        write_atomically(path, json.dumps(dict(identity), indent=2) + "\n")


def digest(tree: Any) -> str:
    """SHA-256 of the arrays of a pytree, with their shapes and dtypes."""
    leaves = jax.tree.leaves(tree)
    hashed = hashlib.sha256()
    for leaf in leaves:
        is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.ascontiguousarray(jax.random.key_data(leaf) if is_key else leaf)
        hashed.update(f"{array.shape}{array.dtype}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()
