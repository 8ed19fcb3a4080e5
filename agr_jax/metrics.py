"""What a run reports: JSON lines on disk, and a progress bar or plain lines for a person."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from agr_jax.errors import NonFiniteLossError


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
        os.fsync(self._file.fileno())

    def forget_after(self, step: int) -> None:
        """Drops records of later steps, and lines that are damaged or half-written.

        A resumed run repeats these steps.
        """
        self._file.close()
        kept = [
            record for record in read_json_lines(self._path) if record.get("step", step + 1) <= step
        ]
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
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
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
        self._bar: Any = None
        if self._stream.isatty() and importlib.util.find_spec("tqdm"):
            import tqdm  # of the `train` extra; plain lines do without

            self._bar = tqdm.tqdm(
                desc=description,
                total=total,
                initial=initial,
                unit=unit,
                file=self._stream,
                leave=False,
                dynamic_ncols=True,
            )

    def expect(self, total: int, description: str = "") -> None:
        """Corrects the total, where it turned out otherwise, and says what is going on now."""
        self._total, self._description = total, description or self._description
        if self._bar is not None:
            self._bar.total = total
            self._bar.set_description(self._description, refresh=False)

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
            line = f"{self._description}: {self._unit} {self._done} of {self._total}"
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

    def __exit__(self, *exception: object) -> None:
        self.close()


class EpochMeter:
    """Sums of an epoch's metrics, weighted by batch size, and the last ones read."""

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._last: dict[str, float] = {}

    def read(
        self, step: int, images: int, metrics: Mapping[str, jax.Array]
    ) -> dict[str, np.ndarray]:
        """Waits for one step's metrics, adds the scalars among them, and returns them all.

        Raises:
            NonFiniteLossError: naming the metric and the step.
        """
        read = jax.device_get(dict(metrics))
        self._last = {name: float(value) for name, value in read.items() if value.ndim == 0}
        for name, value in self._last.items():
            if "loss" in name and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"{name} is {value} at step {step}: training diverged; the last checkpoint "
                    "is kept. Try a smaller config.optimizer.learning_rate"
                )
            self._sums[name] = self._sums.get(name, 0.0) + images * value
            self._counts[name] = self._counts.get(name, 0) + images
        self.images += images
        return read

    def means(self) -> dict[str, float]:
        """The epoch's means."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}

    def note(self) -> str:
        """For the progress bar."""
        loss, accuracy = (self._last.get(f"adversarial_{n}") for n in ("loss", "accuracy"))
        return "" if loss is None else f"loss {loss:.3f}, robust {accuracy:.0%}"

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint within an epoch."""
        return {
            "images": self.images,
            "seconds": self.seconds,
            "sums": dict(self._sums),
            "counts": dict(self._counts),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EpochMeter:
        """Back from a checkpoint."""
        meter = cls()
        meter.images, meter.seconds = values["images"], values["seconds"]
        meter._sums, meter._counts = dict(values["sums"]), dict(values["counts"])
        return meter


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
