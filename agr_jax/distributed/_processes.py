"""Which process this is, of how many."""

from __future__ import annotations

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        index: from 0.
        count: 1 for a process on its own.
    """

    index: int
    count: int


def current() -> Processes:
    """This process among all; alone, it does not start JAX's backend."""
    if not jax.distributed.is_initialized():
        return Processes(0, 1)
    return Processes(jax.process_index(), jax.process_count())


def is_first() -> bool:
    """Whether this is the process that writes files and talks; true of one on its own."""
    return current().index == 0


def say(line: str) -> None:
    """Prints a line on standard output, in the first process only."""
    if is_first():
        print(line, flush=True)
