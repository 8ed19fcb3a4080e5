"""What a run reports: JSON lines on disk, and a progress bar or plain lines for a person."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import tqdm


class JsonLines:
    """Appends one JSON object a line to a file; every line is whole on disk before `write` returns.

    Args:
        path: the file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one record; NaN and infinities become `null`."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def forget_after(self, step: int) -> None:
        """Drops records of later steps, and a half-written last line.

        A resumed run repeats these steps.
        """
        self._file.close()
        kept = [record for record in read_json_lines(self._path) if record["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON-lines file, up to the first line that is not whole."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old one or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Progress:
    """A live bar on a terminal; elsewhere a plain line about every `seconds`.

    Args:
        description: what is going on.
        total: number of units.
        initial: units done before.
        unit: what is counted.
        seconds: between plain lines.
        stream: where to write, standard error by default.
    """

    def __init__(
        self,
        description: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "step",
        seconds: float = 30.0,
        stream: IO[str] | None = None,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._description, self._total, self._unit = description, total, unit
        self._done = self._initial = initial
        self._seconds = seconds
        self._started = self._last = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm.tqdm(
                desc=description,
                total=total,
                initial=initial,
                unit=unit,
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
            )

    def advance(self, units: int = 1, note: str = "") -> None:
        """Counts units as done and shows the note beside them."""
        self._done += units
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
            return
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            rate = (self._done - self._initial) / (now - self._started)
            left = (self._total - self._done) / rate if rate else float("inf")
            line = f"{self._description}: {self._done}/{self._total} {self._unit}s"
            print(f"{line}, {left:.0f} s left {note}".rstrip(), file=self._stream, flush=True)

    def print(self, line: str) -> None:
        """Prints a line on standard output, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
