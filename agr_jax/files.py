"""Files that are whole whenever a reader, or a crash, looks: JSON lines, and atomic writes.

Of several processes that work together the first one writes; in the others nothing happens here.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from agr_jax import distributed


class JsonLines:
    """Appends one JSON object a line to a file; every line is whole on disk before `write` returns.

    Args:
        path: the file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        if distributed.is_first():
            self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; NaN and infinities become `null`."""
        if self._file is None:
            return
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def forget_after(self, step: int) -> None:
        """Drops records of later steps, and lines that are damaged or half-written.

        A resumed run repeats these steps.
        """
        if self._file is None:
            return
        self._file.close()
        kept = [
            record for record in read_json_lines(self._path) if record.get("step", step + 1) <= step
        ]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the objects of a JSON-lines file, leaving out damaged and half-written lines."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one, whole."""
    if not distributed.is_first():
        return
    # Two hosts may have a process of the same number.
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
