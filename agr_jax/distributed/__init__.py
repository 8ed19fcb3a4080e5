"""Several processes as one: how they start, agree with each other, and end together.

Every process runs the same program. What only one may do, such as writing a file, the first does;
what is decided from a file, the first decides and tells the others (`from_first`). JAX itself
connects the processes (`jax.distributed`) and Orbax writes checkpoints in all of them.
"""

from agr_jax.distributed._agreement import (
    broadcast,
    check_same,
    check_shared_folder,
    decided_by_first,
    from_first,
)
from agr_jax.distributed._detection import Plan, detect
from agr_jax.distributed._ending import (
    finish,
    is_about_lost_process,
    leave,
    wait_for_watch,
)
from agr_jax.distributed._processes import Processes, current, is_first, say
from agr_jax.distributed._start import start
from agr_jax.distributed._watch import LOST_PROCESS

__all__ = [
    "LOST_PROCESS",
    "Plan",
    "Processes",
    "broadcast",
    "check_same",
    "check_shared_folder",
    "current",
    "decided_by_first",
    "detect",
    "finish",
    "from_first",
    "is_about_lost_process",
    "is_first",
    "leave",
    "say",
    "start",
    "wait_for_watch",
]
