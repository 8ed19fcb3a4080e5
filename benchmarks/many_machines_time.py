"""Wall time of two processes with one CPU device each against one process with two: paired.

    python benchmarks/many_machines_time.py --data=DIR --turns=3
    python benchmarks/many_machines_time.py --turns=3     # digits: small steps

Each turn trains WRN-10-1 (AGR, PGD-10) with both, in turns one after the other, from the start of
the program to its end, with an empty compilation cache each time. With the folder of CIFAR-10 on
1,280 of its images. An all-reduce between two processes of this machine takes about a millisecond
(gloo), of which a step has 57; so the ratio says what a step has to do beside them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import arrangements

SETTINGS = (
    "--config.data.picture=False",
    "--config.eval.attacks=('clean','pgd20')",
    "--config.eval.examples=256",
    "--config.eval.batch_size=128",
    "--config.optimizer.milestones=(3,)",
)
CIFAR10 = (
    "--config.model.name=wrn10_1",
    "--config.data.train_examples=1280",
    "--config.agr.gics_start_epoch=2",
)


def seconds(arrangement: str, settings: list[str]) -> float:
    """From the start to the end of the last process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
        printed = [Path(folder) / f"{i}.txt" for i in range(int(arrangement[0]))]
        command = ["launch.py", *settings, *SETTINGS, f"--workdir={folder}/run"]
        started = time.monotonic()
        statuses = arrangements.wait(arrangements.start(arrangement, command, printed=printed))
        ended = time.monotonic()
        if any(statuses):
            raise SystemExit("\n".join(path.read_text() for path in printed))
        return ended - started


def main() -> None:
    """Prints each turn and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data", help="folder that holds CIFAR-10, as in config.data.dir")
    options = parser.parse_args()
    settings = ["--config=configs/digits_at.py", f"--config.epochs={options.epochs}"]
    if options.data:
        settings[0] = "--config=configs/cifar10_at.py"
        settings += [*CIFAR10, f"--config.data.dir={options.data}"]
    print("| turn | 1x2, s | 2x1, s | ratio |\n|---|---|---|---|")
    ratios = []
    for turn in range(options.turns):
        order = ("1x2", "2x1") if turn % 2 == 0 else ("2x1", "1x2")
        took = {arrangement: seconds(arrangement, settings) for arrangement in order}
        ratios.append(took["2x1"] / took["1x2"])
        print(
            f"| {turn + 1} | {took['1x2']:.1f} | {took['2x1']:.1f} | {ratios[-1]:.2f} |", flush=True
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
