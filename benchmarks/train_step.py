"""Seconds per AGR training step, next to PyTorch doing the same work on the same machine.

    python benchmarks/train_step.py                                  # JAX only
    python benchmarks/train_step.py --torch-python=OTHER/bin/python  # an environment with PyTorch
    python benchmarks/train_step.py --methods at trades mart awp avmixup --conv canonical
    python benchmarks/train_step.py --batch=128 --steps=50 --conv plain --precision=bfloat16  # GPU

One step: PGD-10 in evaluation mode, clean and adversarial forward and backward in training mode,
AGR on all leaves (clipped), SGD with momentum and weight decay; PreAct-ResNet-18, random images of
32x32. `--precision` is that of `config.precision.train` (in PyTorch: TF32 products, autocast to
bfloat16). `--methods` takes the steps of other methods, each without and with AGR. The
contenders take turns, each in a process of its own; compilation and the first step are not counted.
CPU seconds (user and system, over all cores) are what a busy machine disturbs least; on a GPU look
at wall seconds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PROFILED = 3


def measure_jax(
    conv: str,
    method: str,
    precision: str,
    *,
    agr: bool,
    batch: int,
    width: int,
    steps: int,
    profile: str,
) -> dict[str, Any]:
    """Times `Trainer.step`, attack included, as training runs it."""
    sys.path.insert(0, str(ROOT))
    import jax
    import jax.numpy as jnp
    import optax

    from agr_jax import agr_transform, methods, models, sharding
    from agr_jax.config import from_config_dict
    from agr_jax.data import Augmentation
    from agr_jax.training.loop import matmul_precision
    from agr_jax.training.step import Trainer
    from configs import base

    on = sharding.data_mesh()
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    trainer = Trainer(
        model=models.create("preactresnet18", 10, width=width, conv=conv, dtype=dtype),
        method=methods.from_config(from_config_dict(base.recipe("cifar10", method, "paper"))),
        optimizer=optax.chain(
            agr_transform(), optax.add_decayed_weights(5e-4), optax.sgd(0.01, momentum=0.9)
        ),
        augmentation=Augmentation(crop_padding=0, flip=False, cutout="none"),
        batch_size=batch,
        steps_per_epoch=1,
        batch_stats="clean_then_adversarial",
        mesh=on,
    )
    everywhere = sharding.replicated(on)
    state = trainer.init(jax.random.key(0), (32, 32, 3))
    images = jax.random.randint(jax.random.key(1), (batch, 32, 32, 3), 0, 256).astype(jnp.uint8)
    data = jax.device_put((images, jnp.arange(batch) % 10, jnp.arange(batch)), everywhere)
    step = jax.jit(
        lambda state: trainer.step(
            state, *data, jax.random.key(2), clean_gradient=agr, batch_size=batch
        ),
        donate_argnums=0,
        out_shardings=everywhere,
    )
    with matmul_precision(precision):
        started = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state))
        first = time.perf_counter() - started
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            state, metrics = step(state)
        jax.block_until_ready((state, metrics))
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if profile:
            with jax.profiler.trace(profile):
                for _ in range(PROFILED):
                    state, metrics = step(state)
                jax.block_until_ready((state, metrics))
            memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
            print(f"peak memory {memory / 1e6:.0f} MB; {kernels(Path(profile))}")
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, JAX {jax.__version__}"
    return {"first_step": first, "wall": wall / steps, "cpu": cpu / steps, "device": device}


def kernels(folder: Path) -> str:
    """What a GPU did in the profiled steps, from the newest trace below a folder."""
    newest = max(folder.glob("**/*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    places = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    on_gpu = [
        e
        for e in events
        if "GPU" in places.get(e.get("pid"), "") and "correlation_id" in e.get("args", {})
    ]
    if not on_gpu:
        return "no GPU in the trace"
    busy = sum(e["dur"] for e in on_gpu) / 1000 / PROFILED
    return f"{len(on_gpu) / PROFILED:.0f} kernels a step, busy for {busy:.2f} ms"


def run(python: str, *arguments: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    result = subprocess.run([python, *arguments], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    """Lets the contenders take turns and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2, help="timed steps per turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    parser.add_argument("--torch-python", default="", help="Python that can import torch")
    parser.add_argument("--conv", nargs="+", default=["canonical", "plain"], help="of JAX")
    parser.add_argument("--methods", nargs="+", default=[], help="each without and with AGR")
    parser.add_argument("--only", nargs=3, help="measure CONV METHOD AGR and print JSON")
    parser.add_argument("--profile", default="", help="of --only: folder for JAX's trace")
    options = parser.parse_args()
    if options.only:
        conv, method, agr = options.only
        found = measure_jax(
            conv,
            method,
            options.precision,
            agr=agr == "agr",
            batch=options.batch,
            width=options.width,
            steps=options.steps,
            profile=options.profile,
        )
        print(json.dumps(found))
        return

    sizes = [f"--batch={options.batch}", f"--width={options.width}", f"--steps={options.steps}"]
    sizes.append(f"--precision={options.precision}")
    itself = str(Path(__file__).resolve())
    steps = [(method, agr) for method in options.methods for agr in ("plain", "agr")]
    contenders = {
        f"JAX, {conv} convolution, {method}{' with AGR' if agr == 'agr' else ''}": (
            sys.executable,
            itself,
            *sizes,
            "--only",
            conv,
            method,
            agr,
        )
        for conv in options.conv
        for method, agr in steps or [("at", "agr")]
    }
    if options.torch_python:
        torch_step = str(HERE / "torch_train_step.py")
        contenders = {"PyTorch": (options.torch_python, torch_step, *sizes), **contenders}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for _ in range(options.turns):
        for name, arguments in contenders.items():
            results[name].append(run(*arguments))
    base = next(iter(results))
    print(f"batch {options.batch}, width {options.width}, {options.precision}", end=", ")
    print(f"{options.turns} turns; medians", end="; ")
    print("; ".join(sorted({turns[0]["device"] for turns in results.values()})))
    print(f"| contender | CPU s a step | wall s a step | first step, s | CPU, wall of {base} |")
    print("|---|---|---|---|---|")
    for name, turns in results.items():
        cpu, wall, first = (
            statistics.median(turn[key] for turn in turns) for key in ("cpu", "wall", "first_step")
        )
        # Paired by turn: both saw the same state of the machine.
        ratios = [
            statistics.median(
                mine[key] / theirs[key] for mine, theirs in zip(turns, results[base], strict=True)
            )
            for key in ("cpu", "wall")
        ]
        shown = f"{cpu:.4g} | {wall:.4g} | {first:.1f} | {ratios[0]:.2f}, {ratios[1]:.2f}"
        print(f"| {name} | {shown} |")


if __name__ == "__main__":
    main()
