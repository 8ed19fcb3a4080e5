"""How far a long computation is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import importlib.util
import sys
import time
from typing import IO, Any

from agr_jax import distributed


class Progress:
    """A live bar on a terminal; elsewhere a plain line about every `seconds`.

    Of several processes that work together the first one shows it.

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
        self._is_shown = distributed.is_first()
        if self._is_shown and self._stream.isatty() and importlib.util.find_spec("tqdm"):
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
        if self._is_shown and now - self._last >= self._seconds:
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
            distributed.say(line)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
