"""How processes find each other, agree and end; the long comparisons are in `benchmarks/`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agr_jax import distributed
from agr_jax.errors import ConfigError
from benchmarks import arrangements

ROOT = Path(__file__).resolve().parents[1]
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
FLAGS = {"coordinator": "node1:1234", "processes": 2, "process": 1}


def detect(environ=(), packages=(), **flags):
    return distributed.detect(dict(environ), has_package=lambda name: name in packages, **flags)


def test_nothing_detected_is_alone():
    assert detect({"PATH": "/bin"}) == distributed.Plan("alone")
    assert detect({"PATH": "/bin"}, packages=["libtpu"]).kind == "try"  # a pod knows itself
    assert detect(SRUN, mode="off") == distributed.Plan("alone")
    assert detect(**{**FLAGS, "processes": 1, "process": 0}).kind == "alone"


def test_flags_say_all():
    plan = detect(SRUN, **FLAGS)
    assert plan.kind == "connect"
    assert plan.arguments["coordinator_address"] == "node1:1234"
    assert (plan.arguments["num_processes"], plan.arguments["process_id"]) == (2, 1)
    # Nothing listens on other interfaces, and no cluster is looked for.
    assert plan.arguments["coordinator_bind_address"] == "node1:1234"
    assert plan.arguments["cluster_detection_method"] == "deactivate"
    from_environment = {
        "JAX_COORDINATOR_ADDRESS": "node1:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
    assert detect(from_environment) == plan


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({"mode": "yes"}, {}, "--distributed: must be auto or off, got 'yes'"),
        ({"mode": "off", **FLAGS}, {}, "--distributed=off contradicts --coordinator"),
        ({"processes": 2}, {}, "--processes: also give --coordinator, --process"),
        ({**FLAGS, "coordinator": "node1"}, {}, "must be HOST:PORT, got 'node1'"),
        ({**FLAGS, "process": 2}, {}, "below --processes, got 2 of 2"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI 5 started 4 processes.*mpi4py"),
        ({}, {"PMI_SIZE": "4"}, "MPICH or Intel MPI started 4 processes.*mpi4py"),
    ],
)
def test_what_cannot_be_started_is_said(flags, environ, message):
    with pytest.raises(ConfigError, match=message):
        detect(environ, **flags)


@pytest.mark.parametrize(
    ("changed", "kind", "devices"),
    [
        ({}, "connect", None),  # on CPU
        # The only task of its node has all of its GPUs; JAX would take the first.
        ({"SLURM_GPUS_ON_NODE": "4"}, "connect", [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "connect", [0, 1, 2, 3]),
        # Each task is bound to a GPU of its own, the only one that it sees.
        (
            {
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_LOCALID": "1",
                "SLURM_GPUS_PER_TASK": "1",
                "CUDA_VISIBLE_DEVICES": "0",
            },
            "connect",
            [0],
        ),
        # Four tasks that see four GPUs: one for each, as JAX does it.
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "connect", None),
        # A shell of `salloc`, and an interactive step of a larger allocation.
        ({"SLURM_STEP_NODELIST": None}, "alone", None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, "alone", None),
    ],
)
def test_slurm(changed, kind, devices):
    environ = {k: v for k, v in {**SRUN, **changed}.items() if v is not None}
    plan = detect(environ)
    assert plan.kind == kind
    assert plan.arguments.get("local_device_ids") == devices
    assert ("allocation" in plan.note) == (kind == "alone")


def test_a_step_of_fewer_tasks_than_the_allocation_waits_for_these_alone():
    plan = detect({**SRUN, "SLURM_NTASKS": "8"})
    assert plan.arguments["num_processes"] == 2


def test_mpi_and_kubernetes():
    four = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}
    assert detect(four).kind == "connect"
    five = {"OMPI_COMM_WORLD_SIZE": "4"}
    by_mpi4py = {"cluster_detection_method": "mpi4py"}
    assert detect(five, packages=["mpi4py"]).arguments == by_mpi4py
    assert detect({"OMPI_COMM_WORLD_SIZE": "1"}).kind == "alone"
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert detect(pod, packages=["kubernetes"]) == distributed.Plan("alone")
    indexed = {**pod, "JOB_COMPLETION_INDEX": "0"}
    assert detect(indexed, packages=["kubernetes"]).kind == "connect"
    assert "jax[k8s]" in detect(indexed).note


def test_a_process_on_its_own_agrees_with_itself():
    assert distributed.current() == distributed.Processes(0, 1)
    assert distributed.broadcast(b"told") == b"told"
    assert distributed.from_first(lambda: {"a": [1]}) == {"a": [1]}
    distributed.check_same({"a": 1}, "advice")
    distributed.check_shared_folder(Path("nowhere"))
    distributed.finish()


# ---- two processes

PROGRAM = """
import json, os, sys
from pathlib import Path
import numpy as np
from agr_jax import distributed, files, jobs, sharding
from agr_jax.errors import DataError, UserError

given = dict(argument.removeprefix("--").split("=") for argument in sys.argv[1:])
with jobs.ending_with_one_line():
    distributed.start(distributed.detect({}, coordinator=given["coordinator"],
        processes=int(given["processes"]), process=int(given["process"])))
    me = distributed.current()
    BODY
    distributed.finish()
"""


# As the system does with what was not read: the connection is reset, not closed.
RESET = (
    "import socket, struct; from agr_jax.distributed import _ending; "
    "[peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)) "
    "for peer in _ending.watch._peers.values()]; os._exit(5)"
)


def in_two(tmp_path, body, arrangement="2x1", seconds=60):
    """Runs a body in each process: exit statuses, and what each printed."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("BODY", body.strip().replace("\n", "\n    ")))
    printed = [tmp_path / f"printed-{i}.txt" for i in range(int(arrangement[0]))]
    started = time.monotonic()
    statuses = arrangements.wait(
        arrangements.start(arrangement, [str(program)], printed=printed), seconds
    )
    return statuses, [path.read_text() for path in printed], time.monotonic() - started


def test_what_two_processes_tell_each_other(tmp_path):
    body = f"""
folder = Path({str(tmp_path)!r})
long = bytes(range(256)) * 40
assert distributed.broadcast(long if me.index == 0 else b"other") == long
assert distributed.broadcast(b"") == b""
assert distributed.from_first(lambda: {{"process": me.index}}) == {{"process": 0}}
nested = distributed.decided_by_first(lambda: distributed.from_first(lambda: [me.index]))
assert nested() == [0]
def fail():
    raise DataError("no such file")
try:
    distributed.from_first(fail)
except DataError as error:
    assert str(error) == "no such file"
else:
    raise AssertionError
distributed.check_same({{"batch_size": 8}}, "mend it")
try:
    distributed.check_same({{"batch_size": 8 + me.index, "seed": 0}}, "mend it")
except UserError as error:
    assert "batch_size: 8 in process 0, 9 in process 1): mend it" in str(error), error
else:
    raise AssertionError
distributed.check_shared_folder(folder / "shared")
try:
    distributed.check_shared_folder(folder / f"own-{{me.index}}")
except UserError as error:
    assert "not seen by process 1" in str(error), error
else:
    raise AssertionError
assert me.index or not list(folder.glob("*/.token-*"))  # the first one removes it
files.write_atomically(folder / "written", f"by {{me.index}}")
if me.index == 0:  # the coordinator listens where it was told to, on no other interface
    port = format(int(given["coordinator"].split(":")[1]), "04X")
    sockets = [line.split() for name in ("tcp", "tcp6")
               for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    listening = [where for _, where, _, state, *_ in sockets if state == "0A"]
    (where,) = [each for each in listening if each.endswith(":" + port)]
    assert where.endswith("0100007F:" + port), where  # 127.0.0.1, as IPv4 or mapped into IPv6
import jax
mesh = sharding.data_mesh()
rows = np.arange(8.0).reshape(4, 2)
whole = sharding.put(rows, sharding.replicated(mesh))
split = sharding.put(rows, sharding.batch_sharding(mesh))
loaded = []
own, = sharding.put_rows(lambda part: (loaded.append(part), [rows[part]])[1], 4, mesh)
assert len(loaded) == 2 and sum(p.stop - p.start for p in loaded) == 2  # its own two rows
drawn = jax.random.split(jax.random.key(0), 4)
keys = sharding.put(drawn, sharding.batch_sharding(mesh))
for array in (whole, split, own):
    np.testing.assert_array_equal(sharding.get(array), rows)
np.testing.assert_array_equal(
    sharding.get(jax.random.key_data(keys)), jax.random.key_data(drawn)
)
each = sharding.get(sharding.one_for_each_device(me.index, mesh))
np.testing.assert_array_equal(each, [0, 0, 1, 1])
"""
    statuses, printed, _ = in_two(tmp_path, body, "2x2")
    assert statuses == [0, 0], "\n".join(printed)
    assert (tmp_path / "written").read_text() == "by 0"
    assert "process 1 of 2" in printed[1]


@pytest.mark.parametrize(
    ("does", "status", "line"),
    [
        ("os.kill(os.getpid(), 9)", -9, ""),
        ("raise UserError('a mistake')", 2, "error: a mistake"),
        ("os.kill(os.getpid(), 15)", 143, "error: terminated"),
        ("os.kill(os.getpid(), 2)", 130, "error: interrupted"),
        ("raise ArithmeticError('a fault of ours')", 1, "error: ArithmeticError: a fault of ours"),
        ("sys.exit(3)", 3, "error: ended with status 3"),
        (RESET, 5, ""),
    ],
)
@pytest.mark.parametrize("process", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_no_process_outlives_another(tmp_path, does, status, line, process):
    """Both sit in a collective, or one of them in a long computation, when the other ends."""
    body = f"""
import time
if me.index == {process}:
    time.sleep(0.5)
    {does}
distributed.broadcast(b"never comes")
time.sleep(100)
"""
    statuses, printed, seconds = in_two(tmp_path, body)
    assert seconds < 30
    assert statuses[process] == status
    assert line in printed[process]
    is_coordinator = process == 0
    if is_coordinator and not line and statuses[1] == -signal.SIGABRT:
        return  # JAX's client sees its coordinator gone before our watch does: as the page says
    assert statuses[1 - process] == distributed.LOST_PROCESS
    (last,) = [one for one in printed[1 - process].splitlines() if one.startswith("error: ")]
    assert f"process {1 - process} stops too" in last
    if not is_coordinator:
        assert "coordination" not in printed[1 - process].lower()


@pytest.mark.slow
def test_what_slurm_tells_two_tasks_on_one_node_connects_them(tmp_path):
    """As `srun -n 2` sets the environment; the address of process 0 is not given."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom agr_jax import distributed, jobs\n"
        "with jobs.ending_with_one_line():\n"
        "    distributed.start(distributed.detect(os.environ))\n"
        "    assert distributed.from_first(lambda: 'told') == 'told'\n"
        "    if distributed.current().index == 1:\n"
        "        os._exit(7)\n"
        "    import time; time.sleep(60)\n"
    )
    job = str(os.getpid())  # the port follows from it
    common = {
        **os.environ,
        **SRUN,
        "SLURM_JOB_ID": job,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        subprocess.Popen(
            [sys.executable, program],
            env={**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [each.communicate(timeout=60)[0] for each in running]
    assert [each.returncode for each in running] == [distributed.LOST_PROCESS, 7], printed
    assert "process 1 of 2" in printed[1]
    assert "Process 1 has ended without a word" in printed[0]
    assert "caution" not in "".join(printed)
