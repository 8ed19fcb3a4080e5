"""The command line as a user runs it, in processes of its own: kills, signals, mistakes."""

import atexit
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from agr_jax import diagnostics
from agr_jax.runs.folder import locked

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

# Digits, 256 images, 8 steps an epoch, PGD-2: seconds a run.
SMALL = [
    "--config=configs/digits_at.py",
    "--config.model.name=tests.tiny_network:create",
    "--config.epochs=8",
    "--config.batch_size=32",
    "--config.data.train_examples=256",
    "--config.data.validation_examples=60",
    "--config.attack.steps=2",
    "--config.agr.gics_start_epoch=1",
    "--config.eval.examples=60",
    "--config.eval.attacks=('clean','pgd3')",
    "--config.data.picture=False",
]

# What keeps the most from step to step: two losses in one, perturbed weights, an average.
AWP_ON_TRADES = [
    "--config=configs/digits_awp.py",
    *SMALL[1:],
    "--config.method=trades",
    "--config.attack.objective=kl",
    "--config.attack.random_start=False",
    "--config.attack.start_noise=0.001",
    "--config.averaging.decay=0.9",
    "--config.diagnostics=True",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def environment(**changes: str) -> dict[str, str]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
    inherited = {k: v for k, v in os.environ.items() if k != "TFDS_DATA_DIR"}
    return {**inherited, "JAX_COMPILATION_CACHE_DIR": cache, **changes}


def launch(*arguments: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True
    )


@functools.cache
def server() -> subprocess.Popen:
    """A process that has imported everything: a command takes two seconds less."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.launch_server"],
        cwd=ROOT,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # closes its input, which ends it
    return process


def forked(*arguments: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """As `launch`, in a fork of a process that is there already."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "arguments": arguments,
            "folder": str(cwd),
            "environment": environment(**changes),
        }
        stream = server()
        stream.stdin.write(json.dumps({**request, "stdout": str(out), "stderr": str(err)}) + "\n")
        stream.stdin.flush()
        status = int(stream.stdout.readline())
        return subprocess.CompletedProcess(arguments, status, out.read_text(), err.read_text())


def refused(*arguments: str, cwd: Path = ROOT, **changes: str) -> str:
    """The one line that a failing command prints."""
    result = forked(*arguments, cwd=cwd, **changes)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def last_checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, read in a process without our settings."""
    program = (
        "import sys, numpy, jax, pathlib, json\n"
        "from agr_jax.runs import Run, checkpoints\n"
        "from agr_jax.runs.folder import read_config\n"
        "from agr_jax.training import Trainer\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "run = Run.from_config(read_config(folder), folder)\n"
        "like = Trainer.from_run(run).init(jax.random.key(0), run.dataset.image_shape)\n"
        "path = checkpoints.find(folder)\n"
        "trees = [checkpoints.restore(path, 'variables', like.variables),\n"
        "         checkpoints.restore(path, 'optimizer', like.opt_state)]\n"
        "if (path / 'average').is_dir():\n"
        "    trees.append(checkpoints.restore(path, 'average', like.variables))\n"
        "leaves = {jax.tree_util.keystr(k): numpy.asarray(v)\n"
        "          for k, v in jax.tree.leaves_with_path(trees)}\n"
        "numpy.savez(sys.argv[2], step=int(path.name), **leaves)\n"
    )
    out = folder / "leaves.npz"
    subprocess.run(
        [sys.executable, "-c", program, str(folder), str(out)],
        check=True,
        cwd=ROOT,
        env=environment(),
    )
    with np.load(out, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def run_undisturbed(settings: list[str], folder: Path) -> Path:
    result = launch(*settings, f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    assert "| last | 8 |" in result.stdout
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_undisturbed(SMALL, tmp_path_factory.mktemp("launch") / "undisturbed")


@pytest.fixture(scope="module")
def undisturbed_awp_on_trades(tmp_path_factory):
    return run_undisturbed(AWP_ON_TRADES, tmp_path_factory.mktemp("launch") / "awp_on_trades")


def start_and_wait_for_checkpoint(settings: list[str], folder: Path) -> subprocess.Popen:
    """Starts a run; returns once its first checkpoint is whole: seven epochs follow."""
    process = subprocess.Popen(
        command(*settings, f"--workdir={folder}"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(6000):
        if process.poll() is not None:
            raise AssertionError(f"ended early: {process.communicate()}")
        if any(about.parent.name.isdecimal() for about in folder.glob("checkpoints/*/about")):
            return process
        time.sleep(0.05)
    raise AssertionError("no checkpoint within five minutes")


def assert_same_run(left: Path, right: Path) -> None:
    one, other = last_checkpoint(left), last_checkpoint(right)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def kill_and_continue(settings: list[str], folder: Path) -> None:
    process = start_and_wait_for_checkpoint(settings, folder)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "evaluations").exists(), "it was too quick to be killed in time"
    result = launch(*settings, f"--workdir={folder}")
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 9))


@pytest.mark.slow
def test_killed_within_an_epoch_and_started_again_is_bit_identical(undisturbed, tmp_path):
    kill_and_continue(SMALL, tmp_path / "killed")
    assert_same_run(undisturbed, tmp_path / "killed")


@pytest.mark.slow
def test_killed_awp_on_trades_with_average_and_diagnostics(undisturbed_awp_on_trades, tmp_path):
    kill_and_continue(AWP_ON_TRADES, tmp_path / "killed")
    assert_same_run(undisturbed_awp_on_trades, tmp_path / "killed")
    names = last_checkpoint(tmp_path / "killed").keys()
    assert {name[:3] for name in names} == {"[0]", "[1]", "[2]", "ste"}  # with the average
    ours, theirs = map(diagnostics.read, (tmp_path / "killed", undisturbed_awp_on_trades))
    assert ours.steps.tolist() == list(range(1, 65))
    assert ours.names == theirs.names
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.slow
def test_evaluation_has_a_row_for_the_average(undisturbed_awp_on_trades):
    result = launch("--job=evaluate", f"--workdir={undisturbed_awp_on_trades}")
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("| ")]
    names, epochs = ([cell.strip() for cell in column] for column in zip(*rows, strict=True))
    assert names == ["checkpoint", "last", "best", "average"]
    assert epochs[1] == epochs[3] == "8"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_cleanly(undisturbed, tmp_path, number):
    folder = tmp_path / "stopped"
    process = start_and_wait_for_checkpoint(SMALL, folder)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stdout + stderr
    assert f"stopped by {number.name}" in stdout
    assert "Traceback" not in stderr
    assert launch(*SMALL, f"--workdir={folder}").returncode == 0
    assert_same_run(undisturbed, folder)


def test_evaluate_and_resume_need_no_config_file(undisturbed):
    result = forked("--job=evaluate", f"--workdir={undisturbed}", "--config.eval.examples=20")
    assert result.returncode == 0, result.stderr
    assert "20 test images" in result.stdout
    record = json.loads((undisturbed / "evaluations" / "last-first20.json").read_text())
    assert record["examples"] == 20
    assert forked("--workdir", str(undisturbed)).returncode == 0


@pytest.mark.slow
def test_an_evaluation_killed_at_random_moments_ends_the_same(undisturbed, tmp_path):
    """`AGR_JAX_KILLS=10 pytest -m slow -n0 -k random_moments` kills ten times."""
    arguments = (
        "--job=evaluate",
        "--config.eval.attacks=('clean','pgd10','autoattack','spsa3')",
        "--config.eval.batch_size=24",
        "--config.eval.checkpoints=('last',)",
    )

    def evaluated(folder):
        record = json.loads((folder / "evaluations" / "last-first60.json").read_text())
        for found in record["attacks"].values():
            found.pop("wall_seconds")
            found.pop("seconds", None)
        return record

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(undisturbed, folder)
        shutil.rmtree(folder / "evaluations")
    result = launch(*arguments, f"--workdir={whole}")
    assert result.returncode == 0, result.stderr
    rng = np.random.default_rng()
    done = 0
    for _ in range(int(os.environ.get("AGR_JAX_KILLS", "3"))):
        process = subprocess.Popen(
            command(*arguments, f"--workdir={killed}"),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wanted, deadline = done + rng.integers(1, 4), time.monotonic() + 300
        while done < wanted:
            assert process.poll() is None, (done, wanted)
            assert time.monotonic() < deadline, (done, wanted)
            time.sleep(0.02)
            done = len(list(killed.glob("evaluations/.last-first60/*/*.npz")))
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        process.wait()
        print(f"killed with {done} batches done")
    result = launch(*arguments, f"--workdir={killed}")
    assert result.returncode == 0, result.stderr
    assert evaluated(killed) == evaluated(whole)
    assert not list(killed.glob("evaluations/.last-*"))


def test_a_damaged_checkpoint_is_named(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for path in (folder / "checkpoints" / "64" / "variables").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    result = launch(f"--workdir={folder}", "--config.epochs=9")
    assert result.returncode == 2
    # A failed read makes Orbax complain too, from threads that may cut into our line's beginning.
    (line,) = [line for line in result.stderr.splitlines() if "its 'variables' are damaged" in line]
    assert "checkpoints/64" in line
    assert "Requested byte range" in line
    assert len(line) < 1000


def test_evaluate_refuses_settings_that_are_not_the_runs(undisturbed):
    message = refused("--job=evaluate", f"--workdir={undisturbed}", "--config.attack.epsilon=0.01")
    assert "config.attack.epsilon: 0.15 there, 0.01 here" in message
    assert message.endswith("""as in --config.eval.attacks="('pgd20@linf=16/255',)\"""")


def test_a_run_folder_in_use(undisturbed):
    program = (
        "import pathlib, sys, time\n"
        "from agr_jax.runs.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(undisturbed)], stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert holder.stdout.readline() == b"locked\n"
        message = refused(*SMALL, f"--workdir={undisturbed}")
        assert f"in use by another process (pid {holder.pid} on " in message
    finally:
        holder.kill()
        holder.communicate()
    with locked(undisturbed):  # the dead holder holds nothing
        pass


def test_mistakes_on_the_command_line(tmp_path):
    digits = SMALL[0]
    for arguments, expected in {
        (digits, "--config.agr.gop_strat=1"): "config.agr.gop_strat: no such field; did you mean",
        (digits, "--config.epochs=ten"): "--config.epochs=ten: invalid literal",
        (digits, "--config.epochs=0"): "config.epochs: must be at least 1, got 0",
        (f"{digits}:papper",): "profile: must be one of paper, official, best, got 'papper'",
        ("--config=configs/nothing.py",): "there is no file configs/nothing.py",
        (digits, "epochs=3"): "unexpected argument 'epochs=3'",
        (): "give --config=configs/FILE.py",
        (f"--workdir={tmp_path}",): "is no run folder: it has no config.json",
        ("--job=evaluate", "--workdir=report"): "report is no run folder: it has no config.json",
    }.items():
        assert expected in refused(*arguments), arguments
    # As a user starts it.
    result = launch(digits, "epochs=3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unexpected argument 'epochs=3': flags look like --")


def test_missing_data_names_places_archive_and_address(tmp_path):
    (tmp_path / "tfds").mkdir()
    message = refused(
        f"--config={ROOT}/configs/tinyimagenet_at.py",
        "--config.data.download=False",
        cwd=tmp_path,
        TFDS_DATA_DIR=str(tmp_path / "tfds"),
        HOME=str(tmp_path),
    )
    for part in (
        str(tmp_path / "tfds"),
        str(tmp_path / "data"),
        "tiny-imagenet-200.zip",
        "248,100,043 bytes",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    ):
        assert part in message
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("config.json"))


def cifar_archive(path: Path, *, label: int = 3, member: str = "data_batch_1.bin") -> Path:
    record = bytes([label]) + bytes(3072)
    names = [f"data_batch_{i}.bin" for i in range(2, 6)] + ["test_batch.bin", member]
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(name if ".." in name else f"cifar-10-batches-bin/{name}")
            info.size = len(record) * 20
            archive.addfile(info, io.BytesIO(record * 20))
    return path


def test_damaged_data_is_named(tmp_path):
    def cifar(folder: str) -> str:
        return refused(
            "--config=configs/cifar10_at.py",
            f"--config.data.dir={tmp_path / folder}",
            f"--workdir={tmp_path / 'run'}",
        )

    for folder in ("truncated", "outside", "labels", "partial"):
        (tmp_path / folder).mkdir()
    name = "cifar-10-binary.tar.gz"
    whole = cifar_archive(tmp_path / "partial" / name)
    (tmp_path / "truncated" / name).write_bytes(whole.read_bytes()[:-40])
    cifar_archive(tmp_path / "outside" / name, member="../data_batch_1.bin")
    cifar_archive(tmp_path / "labels" / name, label=11)
    assert "truncated" in cifar("truncated")
    assert "../data_batch_1.bin" in cifar("outside")
    assert "11" in cifar("labels")
    assert "subset_ok" in cifar("partial")


@pytest.mark.slow
def test_tiny_imagenet_trains_with_nothing_but_the_config(tmp_path):
    """The archive is found in ./data; a subset, so `subset_ok`; a small network, to be quick."""
    if not SHARED.is_dir():
        pytest.skip("the real Tiny ImageNet subset is in ../shared/data, which is not here")
    (tmp_path / "data").mkdir()
    shutil.copy(SHARED / "tiny-imagenet-20.zip", tmp_path / "data" / "tiny-imagenet-200.zip")
    result = launch(
        f"--config={ROOT}/configs/tinyimagenet_at.py",
        "--config.model.name=wrn10_1",
        "--config.model.width=4",
        "--config.data.subset_ok=True",
        "--config.data.train_examples=256",
        "--config.epochs=1",
        "--config.eval.examples=200",
        "--config.eval.batch_size=200",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "SUBSET" in result.stdout
    assert "| last | 1 |" in result.stdout
    row = json.loads((tmp_path / "runs/tinyimagenet_at/evaluations/last-first200.json").read_text())
    assert row["complete_data"] is False
    assert row["attacks"]["pgd20"]["correct"] <= row["attacks"]["clean"]["correct"]
