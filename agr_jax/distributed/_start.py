"""Connects this process with the others, or leaves it alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from agr_jax.distributed import _ending
from agr_jax.distributed._agreement import broadcast, check_same
from agr_jax.distributed._detection import Plan
from agr_jax.distributed._processes import Processes, current
from agr_jax.distributed._watch import Watch, end_now

_PACKAGE = Path(__file__).resolve().parents[1]
# All processes are up within this time, or they end.
_SECONDS_TO_START = 50
# Where a machine vanishes without closing its connections. JAX's own default is 100.
_HEARTBEAT_SECONDS = 25


def start(plan: Plan, facts: Mapping[str, Any] = MappingProxyType({})) -> Processes:
    """Connects with the other processes of a plan; before anything starts JAX's backend.

    Where JAX cannot find the others, or not all of them come, it ends the process with a line.

    Args:
        plan: from `detect`.
        facts: JSON values that must be the same in all processes, by what they are.

    Returns:
        This process among all.

    Raises:
        ConfigError: if the others run other code than this one, or were started otherwise.
    """
    if plan.kind == "alone":
        if plan.note:
            print(plan.note, flush=True)
        return Processes(0, 1)
    # SIGTERM is this program's: all stop at one step, and say so.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        _connect(plan)
    except (ValueError, RuntimeError, OSError, KeyError, AttributeError) as error:
        # JAX raises these, and a Kubernetes client's mistakes, where it finds no others.
        if plan.kind == "try":
            return Processes(0, 1)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        # Not raised: JAX takes itself for connected, and would wait for the others at the exit.
        end_now(
            f"the processes of this run could not be connected ({reason}); --distributed=off "
            "runs this one alone",
            2,
        )
    processes = current()
    if processes.count == 1:
        return processes
    check_same(
        {**facts, "code": _code_digest(), "agr_jax": _version(), "jax": jax.__version__},
        "start all with the same line, from the same code",
    )
    try:
        _ending.watch = Watch(processes, _listening_host(plan))
    except OSError as error:
        print(
            f"caution: process {processes.index} is not connected with process 0 ({error}): if one "
            f"ends, the others see it after {_HEARTBEAT_SECONDS} s",
            flush=True,
        )
    devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    says = "writes and reports" if processes.index == 0 else "process 0 reports"
    print(
        f"process {processes.index} of {processes.count} on {platform.node()}, pid {os.getpid()}, "
        f"{devices}: {says}",
        flush=True,
    )
    return processes


def _connect(plan: Plan) -> None:
    """`jax.distributed.initialize`, which where processes are missing would abort, uncaught."""
    given: dict[str, Any] = dict(plan.arguments)
    count = given.get("num_processes")

    def give_up() -> None:
        all_of = f"all {count} processes" if count else "all processes"
        end_now(
            f"not {all_of} were up within {_SECONDS_TO_START} s: start each with the same line, or "
            "give --distributed=off",
            2,
        )

    timer = threading.Timer(_SECONDS_TO_START, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=2 * _SECONDS_TO_START,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
        )
        jax.process_count()  # the backend starts here, in all processes
    finally:
        timer.cancel()


def _listening_host(plan: Plan) -> str:
    """Where the first process can be reached: as given, or at its machine's own address."""
    address = plan.arguments.get("coordinator_address")
    if address is not None:
        return str(address).rpartition(":")[0].strip("[]")
    return broadcast(_own_address().encode()).decode()


def _own_address() -> str:
    """Of this machine, on the way to others; its name may stand for the loopback."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # reserved for examples; nothing is sent
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _code_digest() -> str:
    """Of the package's own source and of the program's."""
    hashed = hashlib.sha256()
    program = Path(sys.argv[0])
    for path in [*sorted(_PACKAGE.rglob("*.py")), *([program] if program.is_file() else [])]:
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def _version() -> str:
    import agr_jax

    return agr_jax.__version__
