"""Wall time of two processes with one CPU device each against one process with two: paired.

    python benchmarks/many_machines_time.py --turns=3

Each turn trains on digits (AGR, PGD-10, WRN-10-1) with both, in turns one after the other, from the
start of the program to its end, with an empty compilation cache each time.
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
    "launch.py",
    "--config=configs/digits_at.py",
    "--config.data.picture=False",
    "--config.eval.attacks=('clean','pgd20')",
)


def seconds(arrangement: str, epochs: int) -> float:
    """From the start to the end of the last process."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder}/xla"
        printed = [Path(folder) / f"{i}.txt" for i in range(int(arrangement[0]))]
        command = [*SETTINGS, f"--config.epochs={epochs}", f"--workdir={folder}/run"]
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
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    print("| turn | 1x2, s | 2x1, s | ratio |\n|---|---|---|---|")
    ratios = []
    for turn in range(options.turns):
        order = ("1x2", "2x1") if turn % 2 == 0 else ("2x1", "1x2")
        took = {arrangement: seconds(arrangement, options.epochs) for arrangement in order}
        ratios.append(took["2x1"] / took["1x2"])
        print(
            f"| {turn + 1} | {took['1x2']:.1f} | {took['2x1']:.1f} | {ratios[-1]:.2f} |", flush=True
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
