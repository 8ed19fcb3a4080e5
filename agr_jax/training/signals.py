"""Leaving a long loop cleanly when a person or a scheduler asks for it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from agr_jax import distributed, sharding


class StopOnSignal:
    """Remembers a SIGINT or SIGTERM, for the loop to act on; a second one acts at once.

    Of several processes that work together all must leave at one step, whichever was asked. So
    each step takes `flag`, and what it returns of it, the same in all, goes to `hear`.

    Attributes:
        signal: the one that all processes know of; `None` if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0
        self._is_one_of_many = distributed.current().count > 1
        self._flags: dict[int, jax.Array] = {}
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._remember)
            except ValueError:  # not in the main thread: the caller's signals are not ours
                break
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if not self._is_one_of_many:
            self.signal = number
        self._restore()

    def flag(self, mesh: Mesh) -> jax.Array | None:
        """What this process has received, for each of its devices; `None` for one on its own."""
        if not self._is_one_of_many:
            return None
        received = self._received
        if received not in self._flags:
            self._flags[received] = sharding.one_for_each_device(received, mesh)
        return self._flags[received]

    def hear(self, flag: Any) -> None:
        """Takes the largest flag of all devices, as a step returned it."""
        self.signal = self.signal or int(flag) or None

    def agree(self) -> None:
        """Asks all processes at once, between steps."""
        if self._is_one_of_many:
            received = np.asarray(self._received, np.int32)
            self.hear(np.max(multihost_utils.process_allgather(received)))

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
