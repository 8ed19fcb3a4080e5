"""How a process of several ends: together with the others, or at once."""

from __future__ import annotations

import time
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from agr_jax.distributed._processes import current
from agr_jax.distributed._watch import Watch, end_now

watch: Watch | None = None
"""Of this process, where it has others beside it."""

# What the errors of a collective or a barrier say when another process is gone.
_SIGNS = ("gloo", "coordination service", "coordination_service", "heartbeat", "barrier", "nccl")
# The watch's own line says more than an error of a collective: it gets so long.
_SECONDS_FOR_THE_WATCH = 5.0


def finish() -> None:
    """Waits until all processes have come to their end, and disconnects."""
    if current().count == 1:
        return
    multihost_utils.sync_global_devices("agr_jax: finish")
    if watch is not None:
        watch.done()
    jax.distributed.shutdown()


def leave(message: str, status: int) -> NoReturn:
    """Ends this process at once with a line, and tells the others, which end too.

    Without it they would wait in their next collective for this one, and this one at its exit for
    them.
    """
    if watch is not None:
        watch.leave(message, status, f"Process {current().index} said: {message}")
    end_now(message, status)


def wait_for_watch() -> None:
    """Where an error may come from a process that is gone: the watch ends this one, and says so."""
    if watch is not None:
        time.sleep(_SECONDS_FOR_THE_WATCH)


def is_about_lost_process(error: BaseException) -> bool:
    """Whether an error, or what caused it, is of a collective that another process has left."""
    if current().count == 1:
        return False
    seen: BaseException | None = error
    while seen is not None:
        if any(sign in str(seen).lower() for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
