"""Whether processes x devices decide about a result: training steps, and AutoAttack's verdicts.

    python benchmarks/arrangements.py steps      # 10 steps in float64, largest differences
    python benchmarks/arrangements.py verdicts   # AutoAttack, also killed and continued elsewhere

CPU processes of this machine, digits, small networks. Each arrangement is compared
with one process on one device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("at", "agr", "trades", "awp")
ARRANGEMENTS = {
    "steps": ("1x1", "1x4", "2x1", "2x2", "4x1"),
    "verdicts": ("1x1", "1x2", "2x1", "2x2"),
}
# version, norm, radius: on this network each leaves some of the images robust and not others.
BALLS = {
    "standard": ("standard", "linf", 0.06),
    "plus": ("plus", "linf", 0.06),
    "l1": ("standard", "l1", 0.8),
}


def start(
    arrangement: str,
    command: Sequence[str],
    *,
    x64: bool = False,
    printed: Sequence[Path] | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a command in so many processes of so many CPU devices, as `--process=I` of them.

    Args:
        arrangement: such as `2x4`.
        command: of one process.
        x64: with float64.
        printed: a file for each process that gets what it prints; by default that is dropped.
    """
    processes, devices = map(int, arrangement.split("x"))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_ENABLE_X64": str(int(x64)),
        "PYTHONPATH": str(ROOT),
    }
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags: list[list[str]] = [[]]
    if processes > 1:
        together = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}"]
        flags = [[*together, f"--process={index}"] for index in range(processes)]
    started = []
    for index, each in enumerate(flags):
        with open(os.devnull if printed is None else printed[index], "w") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, *each],
                    cwd=ROOT,
                    env=environment,
                    text=True,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return started


def wait(running: Sequence[subprocess.Popen[str]], seconds: float = 600) -> list[int]:
    """The exit statuses; what takes longer is killed, and has none."""
    until = time.monotonic() + seconds
    try:
        return [each.wait(max(until - time.monotonic(), 0.1)) for each in running]
    finally:
        for each in running:
            each.kill()


def run(arrangement: str, command: Sequence[str], **options: Any) -> None:
    """Starts a command and waits for its end.

    Raises:
        RuntimeError: if a process fails.
    """
    statuses = wait(start(arrangement, command, **options))
    if any(statuses):
        raise RuntimeError(f"{arrangement}: {' '.join(command)} ended with {statuses}")


# ---- what a process does


def take_steps(name: str, target: Path) -> None:
    """Ten training steps in float64; the first process writes all that they gave."""
    import dataclasses

    import jax
    import jax.numpy as jnp
    import numpy as np

    from agr_jax import distributed, sharding
    from agr_jax.data.feed import Feed, TrainingImages
    from agr_jax.runs import Run
    from agr_jax.training import Trainer

    trained = Run.from_config(config_of(name), target.parent)
    trainer = Trainer.from_run(trained)
    trainer = dataclasses.replace(trainer, model=trained.model(jnp.float64))
    state = trainer.init(jax.random.key(0), trained.dataset.image_shape)
    state = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    images = TrainingImages(trained.dataset.train)
    step = jax.jit(
        trainer.step_on_batch,
        static_argnames="clean_gradient",
        out_shardings=sharding.replicated(trained.mesh),
    )
    feed = Feed(images, trained.mesh, budget_mb=1)
    feed.on_device = False  # streamed: each process reads its own rows
    sizes = [trainer.batch_size] * trainer.steps_per_epoch
    gathered: list[dict[str, Any]] = []
    for epoch in range(-(-10 // len(sizes))):
        _, batches = feed.epoch(images.order(jax.random.key(1), epoch, sizes), sizes, 0)
        for batch in batches:
            state, metrics = step(state, key=jax.random.key(2), clean_gradient=True, **batch)
            gathered.append(jax.device_get(metrics))
    found = {f"step {i} {name}": v for i, m in enumerate(gathered[:10]) for name, v in m.items()}
    leaves = jax.tree.leaves_with_path((state.params, state.batch_stats, state.opt_state))
    found |= {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    if distributed.is_first():
        np.savez(target, **found)


def config_of(name: str) -> Any:
    """PGD-10 on digits, 5 steps an epoch."""
    from agr_jax.config import from_config_dict
    from configs import digits_at, digits_awp, digits_trades

    files = {"trades": digits_trades, "awp": digits_awp}
    values = files.get(name, digits_at).get_config()
    with values.unlocked():
        values.model.name = "tests.tiny_network:create"
        values.epochs, values.batch_size = 2, 64
        values.data.train_examples, values.data.validation_examples = 320, 60
        values.attack.steps = 10
        values.agr.enabled = name != "at"
        values.agr.gics_start_epoch = 1
        values.awp.start_epoch = 0
        values.data.crop_padding = 1
    return from_config_dict(values)


def evaluate(name: str, target: Path) -> None:
    """AutoAttack on 64 images of a small network; its progress stays beside the result."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from agr_jax import data, distributed, sharding
    from agr_jax.attacks import autoattack
    from agr_jax.data import to_unit_range
    from agr_jax.threat import NORMS

    version, norm, radius = BALLS[name]
    dataset = data.load_dataset("digits")
    images = np.asarray(to_unit_range(jnp.asarray(dataset.test.images[:64])))
    train = np.asarray(to_unit_range(jnp.asarray(dataset.train.images)))
    # The least squares fit to one-hot labels, in two layers: a network without training.
    hidden = np.random.default_rng(0).normal(size=(64, 256)) / 8
    features = np.maximum((train.reshape(len(train), -1) - 0.5) @ hidden, 0)
    targets = np.eye(10)[dataset.train.labels]
    last = np.linalg.solve(features.T @ features + 0.1 * np.eye(256), features.T @ targets)
    layers = jnp.asarray(hidden, jnp.float32), jnp.asarray(20 * last, jnp.float32)

    def logits(layers: Any, images: jax.Array) -> jax.Array:
        features = jnp.maximum((images.reshape(len(images), -1) - 0.5) @ layers[0], 0)
        return features @ layers[1]

    attack = autoattack(NORMS[norm](radius), version, batch_size=32)
    found = attack.evaluate(
        jax.tree_util.Partial(logits, layers),
        images,
        dataset.test.labels[:64],
        jax.random.key(0),
        folder=target.with_suffix(".progress"),
        on=sharding.data_mesh(),
        progress=False,
    )
    if distributed.is_first():
        masks = {name: mask.tolist() for name, mask in found.robust_after.items()}
        target.write_text(json.dumps(masks))


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[None]:
    """This process together with the others of its arrangement, as `start` told it."""
    from agr_jax import distributed, jobs

    with jobs.ending_with_one_line():
        distributed.start(
            distributed.detect(
                {},
                coordinator=options.coordinator,
                processes=options.processes,
                process=options.process,
            )
        )
        yield
        distributed.finish()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Those that `start` gives to each process."""
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)


def work(options: argparse.Namespace) -> None:
    """One process of an arrangement."""
    with joined(options):
        {"steps": take_steps, "verdicts": evaluate}[options.what](options.name, options.target)


# ---- the comparisons


def compare_steps(names: Sequence[str], arrangements: Sequence[str]) -> float:
    """Prints and returns the largest difference, relative where a value is above 1."""
    import numpy as np

    worst = 0.0
    print("| method | processes x devices | values | largest difference |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = {}
            for arrangement in arrangements:
                target = Path(folder) / f"{name}-{arrangement}.npz"
                run(arrangement, command("steps", name, target), x64=True)
                with np.load(target) as file:
                    found[arrangement] = {key: file[key] for key in file.files}
            first = found[arrangements[0]]
            for arrangement in arrangements[1:]:
                differences = [
                    np.max(
                        np.abs(value - first[key]) / np.maximum(1, np.abs(first[key])), initial=0
                    )
                    for key, value in found[arrangement].items()
                ]
                assert found[arrangement].keys() == first.keys()
                worst = max(worst, *differences)
                size = sum(value.size for value in first.values())
                print(f"| {name} | {arrangement} | {size:,} | {max(differences):.1e} |", flush=True)
    return worst


def compare_verdicts(names: Sequence[str], arrangements: Sequence[str], seed: int) -> int:
    """Prints and returns how many verdicts differ."""
    generator, differing = random.Random(seed), 0  # noqa: S311
    print(
        "| attack | processes x devices | robust of 64 | verdicts that differ |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            first: dict[str, Any] = {}
            for number, arrangement in enumerate(arrangements):
                target = Path(folder) / f"{name}-{arrangement}.json"
                run(arrangement, command("verdicts", name, target))
                found = json.loads(target.read_text())
                first = first or found
                title = arrangement
                differing += _report(name, title, first, found)
                # Killed somewhere on the way, and continued on the next arrangement.
                other = arrangements[(number + 1) % len(arrangements)]
                target = Path(folder) / f"{name}-{arrangement}-{other}.json"
                progress, batches = target.with_suffix(".progress"), generator.randint(1, 12)
                running = start(arrangement, command("verdicts", name, target))
                while len(list(progress.glob("*.npz"))) < batches and running[0].poll() is None:
                    time.sleep(0.02)
                generator.choice(running).send_signal(signal.SIGKILL)
                wait(running, 60)
                kept = len(list(progress.glob("*.npz")))
                run(other, command("verdicts", name, target))
                found = json.loads(target.read_text())
                title = f"{arrangement}, killed after {kept} batches, then {other}"
                differing += _report(name, title, first, found)
    return differing


def _report(name: str, title: str, first: dict[str, Any], found: dict[str, Any]) -> int:
    differing = sum(a != b for key in first for a, b in zip(first[key], found[key], strict=True))
    left = " / ".join(str(sum(mask)) for mask in found.values())
    print(f"| {name} | {title} | {left} | {differing} |", flush=True)
    return differing


def command(what: str, name: str, target: Path) -> list[str]:
    """Of one process."""
    return [__file__, "work", f"--what={what}", f"--name={name}", f"--target={target}"]


def main() -> None:
    """Runs a comparison, or one process of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["steps", "verdicts", "work"])
    parser.add_argument("--names", help="methods, or attacks, separated by commas")
    parser.add_argument("--arrangements", help="such as 1x1,2x2")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    for name in ("what", "name"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--target", type=Path)
    add_flags(parser)
    options = parser.parse_args()
    if options.action == "work":
        work(options)
        return
    known = METHODS if options.action == "steps" else tuple(BALLS)
    names = options.names.split(",") if options.names else known
    chosen = options.arrangements
    arrangements = chosen.split(",") if chosen else ARRANGEMENTS[options.action]
    if options.action == "steps":
        sys.exit(int(compare_steps(names, arrangements) > 1e-9))
    sys.exit(int(compare_verdicts(names, arrangements, options.seed) > 0))


if __name__ == "__main__":
    main()
