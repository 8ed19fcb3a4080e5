"""Whether runs that an earlier commit began are resumed to the same bits.

    python benchmarks/resumed_bits.py --commit=522014f

Each run trains on digits for two epochs at the commit, in a checkout of its own. A copy of it is
resumed there to four epochs, another one here. Arrays of the last checkpoints (parameters,
statistics, optimiser, moving average) and metrics are compared. With PGD-2, without AGR, with AWP,
with averaging and without an attack; about three minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

HERE = Path(__file__).resolve().parents[1]
SMALL = [
    "--config.data.train_examples=256",
    "--config.data.validation_examples=60",
    "--config.data.picture=False",
    "--config.batch_size=64",
    "--config.attack.steps=2",
    "--config.agr.gics_start_epoch=1",
    "--config.optimizer.milestones=(3,)",
    "--config.eval.examples=60",
    "--config.eval.attacks=('clean',)",
]
RUNS = {
    "AGR": ["--config=configs/digits_at.py"],
    "AT": ["--config=configs/digits_at.py", "--config.agr.enabled=False"],
    "AWP": ["--config=configs/digits_awp.py", "--config.awp.start_epoch=1"],
    "averaging": ["--config=configs/digits_at.py", "--config.averaging.decay=0.9"],
    "standard": ["--config=configs/digits_standard.py"],
}
TIMES = {"seconds", "images_per_second", "peak_memory_mb"}


def train(checkout: Path, folder: Path, settings: list[str], epochs: int) -> None:
    """Starts or resumes a run with the code of a checkout, on one device."""
    subprocess.run(
        [
            sys.executable,
            "launch.py",
            *settings,
            *SMALL,
            f"--config.epochs={epochs}",
            f"--workdir={folder}",
        ],
        check=True,
        cwd=checkout,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(checkout)},
        stdout=subprocess.DEVNULL,
    )


def state_of(folder: Path) -> dict[str, Any]:
    """Every array of the last checkpoint, by its place, and the metrics but for times."""
    checkpoint = max(
        (path for path in (folder / "checkpoints").iterdir() if path.name.isdecimal()),
        key=lambda path: int(path.name),
    )
    trees = {
        item: ocp.StandardCheckpointer().restore((checkpoint / item).absolute())
        for item in ("variables", "optimizer", "average")
        if (checkpoint / item).is_dir()
    }
    found = {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree.leaves_with_path(trees)}
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    metrics = [
        {name: value for name, value in json.loads(line).items() if name not in TIMES}
        for line in lines
    ]
    return {**found, "metrics": metrics}


def main() -> None:
    """Prints, for each run, how many arrays differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        before = Path(temporary) / "before"
        git = shutil.which("git") or "git"
        subprocess.run([git, "clone", "-q", str(HERE), str(before)], check=True)
        subprocess.run([git, "-C", str(before), "checkout", "-q", options.commit], check=True)
        for name, settings in RUNS.items():
            there, here = Path(temporary) / f"{name}-there", Path(temporary) / f"{name}-here"
            train(before, there, settings, 2)
            shutil.copytree(there, here)
            train(before, there, settings, 4)
            train(HERE, here, settings, 4)
            left, right = state_of(there), state_of(here)
            assert left.keys() == right.keys()
            metrics = left.pop("metrics") == right.pop("metrics")
            differing = [
                place
                for place, leaf in left.items()
                if not np.array_equal(leaf, right[place], equal_nan=True)
            ]
            print(
                f"{name}: {len(differing)} of {len(left)} arrays differ, metrics "
                f"{'the same' if metrics else 'differ'}",
                flush=True,
            )


if __name__ == "__main__":
    main()
