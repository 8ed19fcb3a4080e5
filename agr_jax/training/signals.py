"""Leaving a long loop cleanly when a person or a scheduler asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopOnSignal:
    """Remembers a SIGINT or SIGTERM, for the loop to act on; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: the caller's signals are not ours
                break
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
