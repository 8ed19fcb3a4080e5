"""Whether this process has others beside it, seen from the flags and the environment.

JAX detects clusters itself; what is looked at here is when it would wait for processes that do not
come, take one GPU of several, or fail with a message that says nothing about the cause
(`jax._src.clusters` of jax 0.10 to 0.12).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from agr_jax.errors import ConfigError

_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
HasPackage = Callable[[str], bool]
_ADVICE = "give --coordinator=HOST:PORT --processes=N --process=I, or --distributed=off"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How this process starts.

    Attributes:
        kind: `alone`; `connect`, with others; `try`, with others if JAX finds any.
        arguments: of `jax.distributed.initialize`.
        note: a line for the user, where something may not be as it seems.
    """

    kind: Literal["alone", "connect", "try"]
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""


def detect(
    environ: Mapping[str, str],
    *,
    mode: str = "auto",
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    has_package: HasPackage | None = None,
) -> Plan:
    """The plan for a process.

    Args:
        environ: of the process.
        mode: `auto` or `off`.
        coordinator: `HOST:PORT` of process 0; with it, the number of processes and this one's.
        processes: how many there are.
        process: which one this is, from 0.
        has_package: says whether a package is installed; by default it is looked for.

    Raises:
        ConfigError: on flags that contradict each other, or an environment of several processes
            that cannot be made out.
    """
    has_package = has_package or (lambda name: importlib.util.find_spec(name) is not None)
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    named = [name for name, value in given.items() if value is not None]
    if mode not in ("auto", "off"):
        raise ConfigError(f"--distributed: must be auto or off, got {mode!r}")
    if mode == "off":
        if named:
            raise ConfigError(f"--distributed=off contradicts {', '.join(named)}")
        return Plan("alone")
    if named:
        if len(named) < len(given):
            missing = ", ".join(name for name in given if name not in named)
            raise ConfigError(f"{', '.join(named)}: also give {missing}")
        assert coordinator is not None
        assert processes is not None
        assert process is not None
        return _explicit(coordinator, processes, process)
    for detector in (_open_mpi, _slurm, _other_mpi, _kubernetes, _half_given):
        plan = detector(environ, has_package)
        if plan is not None:
            return plan
    # A TPU pod says so to its own library alone.
    return Plan("try") if has_package("libtpu") else Plan("alone")


def _explicit(coordinator: str, processes: int, process: int) -> Plan:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: must be HOST:PORT, got {coordinator!r}")
    if processes < 1 or not 0 <= process < processes:
        raise ConfigError(
            f"--process: must be at least 0 and below --processes, got {process} of {processes}"
        )
    if processes == 1:
        return Plan("alone")
    return Plan(
        "connect",
        {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            # By default it would listen on all interfaces.
            "coordinator_bind_address": coordinator,
            # Nothing else is looked for: the flags say it all.
            "cluster_detection_method": "deactivate",
        },
    )


def _open_mpi(environ: Mapping[str, str], has_package: HasPackage) -> Plan | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    if environ["OMPI_COMM_WORLD_SIZE"] == "1":
        return Plan("alone")
    if "OMPI_MCA_orte_hnp_uri" in environ:  # up to Open MPI 4
        return Plan("connect", _devices_of_local_rank(environ, "OMPI_COMM_WORLD_LOCAL_SIZE"))
    return _by_mpi4py(f"Open MPI 5 started {environ['OMPI_COMM_WORLD_SIZE']}", has_package)


def _slurm(environ: Mapping[str, str], has_package: HasPackage) -> Plan | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    tasks = environ.get("SLURM_NTASKS", "1")
    if not all(name in environ for name in _SLURM):
        if "PMI_SIZE" in environ:  # another launcher's, in an allocation of Slurm's
            return None
        note = ""
        if tasks != "1":
            note = (
                f"not started by srun: alone, though the allocation has {tasks} tasks; "
                "`srun python launch.py ...` starts one process for each"
            )
        return Plan("alone", note=note)
    # The tasks of this step: an interactive shell may be one of a larger allocation.
    count = int(environ.get("SLURM_STEP_NUM_TASKS", tasks))
    if count == 1:
        note = ""
        if tasks != "1":
            note = f"alone in this step of an allocation of {tasks} tasks"
        return Plan("alone", note=note)
    arguments = _devices_of_local_rank(environ, "SLURM_STEP_TASKS_PER_NODE")
    return Plan("connect", {**arguments, "num_processes": count})


def _devices_of_local_rank(environ: Mapping[str, str], tasks: str) -> dict[str, Sequence[int]]:
    """All of a process's GPUs, where it was given several or is the only one of its node.

    JAX takes the one with the process's number on its node, which is one of several, or, where the
    process was given a single one, may not exist.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    local = environ.get("SLURM_GPUS_ON_NODE", "")
    alone = environ.get(tasks, "").split("(")[0] == "1"
    # `srun --gpus-per-task` binds each task to its own: what it sees are all its own.
    bound = environ.get("SLURM_GPUS_PER_TASK") is not None
    if visible and (alone or bound):
        return {"local_device_ids": list(range(len(visible.split(","))))}
    if alone and local.isdecimal() and int(local) > 0:
        return {"local_device_ids": list(range(int(local)))}
    return {}


def _other_mpi(environ: Mapping[str, str], has_package: HasPackage) -> Plan | None:
    count = environ.get("PMI_SIZE", "1")
    if not count.isdecimal() or int(count) <= 1:
        return None
    return _by_mpi4py(f"MPICH or Intel MPI started {count}", has_package)


def _by_mpi4py(started: str, has_package: HasPackage) -> Plan:
    if has_package("mpi4py"):
        return Plan("connect", {"cluster_detection_method": "mpi4py"})
    raise ConfigError(
        f"{started} processes, which JAX connects with the package mpi4py: install it; or {_ADVICE}"
    )


def _kubernetes(environ: Mapping[str, str], has_package: HasPackage) -> Plan | None:
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return None
    if "JOB_COMPLETION_INDEX" not in environ:
        return Plan("alone")  # a pod of its own, or of a Job that is not indexed
    if has_package("kubernetes"):
        return Plan("connect")
    return Plan(
        "alone",
        note="alone: for one run in all pods of an indexed Job install the package kubernetes "
        f"(pip install 'jax[k8s]'); or {_ADVICE}",
    )


def _half_given(environ: Mapping[str, str], has_package: HasPackage) -> Plan | None:
    address = environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        return None
    count, index = environ.get("JAX_NUM_PROCESSES"), environ.get("JAX_PROCESS_ID")
    if count is None or index is None or not (count.isdecimal() and index.isdecimal()):
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS is {address!r}, but not how many processes there are "
            f"(JAX_NUM_PROCESSES, JAX_PROCESS_ID): {_ADVICE}"
        )
    return _explicit(address, int(count), int(index))
