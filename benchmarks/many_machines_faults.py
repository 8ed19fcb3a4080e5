"""Ends one of several processes at a random moment: does anything hang, or get lost?

    python benchmarks/many_machines_faults.py --faults=40 --table=FILE.md

CPU processes of this machine train a small run on digits (AGR, PGD-10, four epochs) and evaluate
it. In each of them one process is ended: `kill -9`, SIGTERM, Ctrl-C (SIGINT), or an exception that
is raised in it. Then the same command is started again, until it is done. Asked of each fault: how
long the last process lived on, what it printed, the exit statuses, whether the steps that were said
to be saved are still there, and whether the end has the bits of a run that nothing disturbed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import arrangements
import jax
import numpy as np
import orbax.checkpoint as ocp

KINDS = ("kill -9", "SIGTERM", "Ctrl-C", "exception")
PHASES = ("start", "training", "validation", "saving", "evaluation")
SETTINGS = (
    "--config=configs/digits_at.py",
    "--config.model.name=tests.tiny_network:create",
    "--config.epochs=4",
    "--config.batch_size=32",
    "--config.optimizer.milestones=(3,)",
    "--config.agr.gics_start_epoch=2",
    "--config.data.train_examples=640",
    "--config.data.picture=False",
    "--config.checkpoints.every_epochs=1",
    "--config.eval.attacks=('clean','pgd20','autoattack')",
    "--config.eval.examples=64",
    "--config.eval.batch_size=16",
)
LIMIT = 30.0  # seconds that nobody may live on
START_LIMIT = 60.0  # before all are connected: so long the others are waited for


class Fault(NamedTuple):
    """One fault."""

    arrangement: str
    phase: str
    kind: str
    process: int


class Outcome(NamedTuple):
    """What it did."""

    seconds: float
    statuses: list[int]
    lines: list[str]
    walls: int
    lost: bool
    same_bits: bool


def command(folder: Path) -> list[str]:
    """Of one process; a file `raise-PROCESS` in the folder is the exception."""
    return [__file__, "work", f"--workdir={folder}"]


def work(arguments: list[str]) -> None:
    """`launch.py`, in which a thread raises an exception in the main thread when it is told to."""
    import ctypes
    import runpy
    import threading

    folder = Path(next(a.partition("=")[2] for a in arguments if a.startswith("--workdir=")))
    process = next((a.partition("=")[2] for a in arguments if a.startswith("--process=")), "0")
    main = threading.main_thread().ident

    def watch() -> None:
        while not (folder / f"raise-{process}").is_file():
            time.sleep(0.01)
        (folder / f"raise-{process}").unlink()
        while True:  # whoever is at work may swallow one
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(main or 0), ctypes.py_object(ArithmeticError)
            )
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
    sys.argv = ["launch.py", *SETTINGS, *arguments]
    runpy.run_path(str(arrangements.ROOT / "launch.py"), run_name="__main__")


def wait_for(phase: str, folder: Path, generator: random.Random) -> None:
    """Until a run is in a phase, and a random moment longer."""
    checkpoints, metrics = folder / "checkpoints", folder / "metrics.jsonl"

    def lines() -> int:
        return len(metrics.read_bytes().splitlines()) if metrics.is_file() else 0

    wanted = generator.randint(1, 3)
    reached = {
        "start": lambda: True,
        "training": lambda: (folder / "config.json").is_file() and lines() >= wanted - 1,
        "validation": lambda: lines() >= wanted,
        "saving": lambda: any(checkpoints.glob("*tmp*")),
        "evaluation": lambda: any(folder.glob("evaluations/.*/*/*.npz")),
    }[phase]
    until = time.monotonic() + 240
    while not reached() and time.monotonic() < until:
        time.sleep(0.002)
    longest = {"start": 6.0, "training": 1.0, "validation": 0.3, "saving": 0.05, "evaluation": 8.0}
    time.sleep(generator.uniform(0, longest[phase]))


def strike(fault: Fault, running: list[subprocess.Popen[str]], folder: Path) -> None:
    """Ends one process."""
    signals = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
    if fault.kind == "exception":
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"raise-{fault.process}").touch()
    else:
        running[fault.process].send_signal(signals[fault.kind])


def try_fault(fault: Fault, folder: Path, expected: dict[str, str], seed: int) -> Outcome:
    """Starts a run, ends one of its processes, and starts it again."""
    generator = random.Random(seed)  # noqa: S311
    printed = [folder.with_name(f"{folder.name}.{i}.txt") for i in range(int(fault.arrangement[0]))]
    running = start(fault.arrangement, folder, printed)
    wait_for(fault.phase, folder, generator)
    saved = steps_on_disk(folder)
    strike(fault, running, folder)
    struck = time.monotonic()
    statuses: list[int] = []
    while time.monotonic() - struck < 4 * LIMIT and any(p.poll() is None for p in running):
        time.sleep(0.01)
    seconds = time.monotonic() - struck
    for each in running:
        each.kill()
    statuses = [each.wait() for each in running]
    texts = [path.read_text(errors="replace") for path in printed]
    errors = [line for text in texts for line in text.splitlines() if is_last_word(line)]
    walls = sum("*** Check failure" in text or "coordination_service" in text for text in texts)
    (folder / f"raise-{fault.process}").unlink(missing_ok=True)
    lost = not saved <= steps_on_disk(folder) | replaced(folder, saved)
    for _ in range(2):  # the same command, until it is done
        if all(code == 0 for code in arrangements.wait(start(fault.arrangement, folder, printed))):
            break
    return Outcome(seconds, statuses, errors, walls, lost, digests(folder) == expected)


def start(arrangement: str, folder: Path, printed: list[Path]) -> list[subprocess.Popen[str]]:
    """The processes of a run, each with a file that it prints into."""
    return arrangements.start(arrangement, command(folder), printed=printed)


def is_last_word(line: str) -> bool:
    """What a process says of its end."""
    return line.startswith(("error: ", "stopped by "))


def steps_on_disk(folder: Path) -> set[int]:
    """Steps of whole checkpoints."""
    return {
        int(path.name)
        for path in folder.glob("checkpoints/*")
        if path.name.isdecimal() and (path / "about").is_dir()
    }


def replaced(folder: Path, saved: set[int]) -> set[int]:
    """Steps that a later checkpoint stands for: only the last one, and the best, are kept."""
    left = steps_on_disk(folder)
    return {step for step in saved if left and max(left) >= step}


def digests(folder: Path) -> dict[str, str]:
    """Of the last checkpoint's arrays, of the metrics and of the verdicts of an evaluation."""
    found: dict[str, str] = {}
    last = max(steps_on_disk(folder), default=None)
    if last is None:
        return found
    for item in ("variables", "optimizer"):
        path = (folder / "checkpoints" / str(last) / item).absolute()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            # Arrays of the host: without that, devices of as many processes would be asked for.
            like = reader.metadata(path).item_metadata.tree
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), like)
            tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
        leaves = jax.tree.leaves_with_path(tree)
        found |= {
            f"{item} {jax.tree_util.keystr(name)}": hashlib.sha256(
                np.asarray(leaf).tobytes()
            ).hexdigest()
            for name, leaf in leaves
        }
    times = re.compile(r'"(seconds|images_per_second|peak_memory_mb)": [^,}]*,? ?')
    found["metrics"] = times.sub("", (folder / "metrics.jsonl").read_text())
    for path in sorted(folder.glob("evaluations/*.json")):
        for name, entry in json.loads(path.read_text())["attacks"].items():
            found[f"{path.name} {name}"] = entry["correct_images"]
    return found


def main() -> None:
    """Tries faults and prints a table."""
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument("--table", type=Path, help="a file to append the rows to")
    parser.add_argument("--phases", default=",".join(PHASES), help="separated by commas")
    options = parser.parse_args()
    phases = options.phases.split(",")
    worst, hangs, lost, other_bits = 0.0, 0, 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        expected = {}
        for arrangement in ("2x1", "2x2"):
            folder = Path(temporary) / f"undisturbed-{arrangement}"
            printed = [folder.with_name(f"{folder.name}.{i}.txt") for i in range(2)]
            statuses = arrangements.wait(start(arrangement, folder, printed))
            if any(statuses):
                raise SystemExit(f"{statuses}\n" + "\n".join(p.read_text() for p in printed))
            expected[arrangement] = digests(folder)
        for number in range(options.first, options.first + options.faults):
            fault = Fault(
                ("2x1", "2x2")[number // 2 % 2],
                phases[number % len(phases)],
                KINDS[number // len(phases) % len(KINDS)],
                number % 2,
            )
            folder = Path(temporary) / f"run-{number}"
            outcome = try_fault(fault, folder, expected[fault.arrangement], seed=number)
            shutil.rmtree(folder)
            worst = max(worst, outcome.seconds)
            hangs += outcome.seconds > (START_LIMIT if fault.phase == "start" else LIMIT)
            lost += outcome.lost
            other_bits += not outcome.same_bits
            row = (
                f"| {number} | {fault.arrangement} | {fault.phase} | {fault.kind} | "
                f"{fault.process} | {outcome.seconds:.1f} | "
                f"{', '.join(map(str, outcome.statuses))} | {len(outcome.lines)} | "
                f"{'**lost**' if outcome.lost else 'kept'} | "
                f"{'same' if outcome.same_bits else '**other**'} |"
            )
            print(row, *(["C++ text"] if outcome.walls else []), flush=True)
            for line in outcome.lines:
                print(f"    {line[:200]}", flush=True)
            if options.table:
                with options.table.open("a") as file:
                    file.write(row + "\n")
    print(
        f"{options.faults} faults: {hangs} hangs over {LIMIT:.0f} s (at the start "
        f"{START_LIMIT:.0f} s; longest {worst:.1f} s), "
        f"{lost} lost results, {other_bits} ends with other bits"
    )
    sys.exit(int(bool(hangs or lost or other_bits)))


if __name__ == "__main__":
    main()
