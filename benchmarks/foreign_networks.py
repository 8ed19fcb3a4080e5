"""Attacks on networks that are not this library's: against the same steps taken from the host.

    python benchmarks/foreign_networks.py                       # PGD-20 on four networks
    python benchmarks/foreign_networks.py --recompile           # a fresh lambda in each call
    python benchmarks/foreign_networks.py --autoattack --golden=FOLDER

The naive loop, which everyone writes, is one jitted gradient for each step, from the host, and one
jitted step along its sign. Its columns:

- `attack`: `pgd(...)(network, ...)`, as users call it;
- `in jit`: the same within the caller's own `jax.jit`;
- `with library`: as `attack`, but with XLA's default library for convolutions;
- `not rewritten`: as `in jit`, but with the network as it is, which is what a plain loop does.

All are timed in turns within one process, compilation not counted (but with the tracing of each
call); a ratio is the median over turns, paired. CPU seconds (user and system, over all cores) are
what a busy machine disturbs least. `--autoattack` runs AutoAttack `standard` on the trained network
of `cifar_cnn_a_adv` (`weights_cifar_cnn_a_adv.npz` and `images.npz` in FOLDER), with this library's
convolution and with Flax's, in turns.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from agr_jax import losses
from agr_jax.attacks import _calling as calling
from agr_jax.attacks import autoattack, pgd
from agr_jax.models.convolution import convolve
from agr_jax.threat import Linf

GOLDEN = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
EPSILON, STEP, STEPS = 8 / 255, 2 / 255, 20
Network = Callable[[jax.Array], jax.Array]


class LinenBlock(nn.Module):
    """Two convolutions and a shortcut, post-activation."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `[batch, height, width, channels]`."""
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), self.stride)(x)))
        y = norm()(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), self.stride)(x))
        return nn.relu(x + y)


class LinenResNet18(nn.Module):
    """ResNet-18 of width 16 in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        for stage, features in enumerate((16, 32, 64, 128)):
            for block in range(2):
                x = LinenBlock(features, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    """The same in NNX."""

    def __init__(self, inputs: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.first = conv(inputs, features, (3, 3), strides=stride)
        self.second = conv(features, features, (3, 3))
        self.norms = nnx.List([norm(features), norm(features)])
        short = stride > 1 or inputs != features
        self.shortcut = conv(inputs, features, (1, 1), strides=stride) if short else None
        if short:
            self.norms.append(norm(features))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Of `[batch, height, width, channels]`."""
        y = nnx.relu(self.norms[0](self.first(x)))
        y = self.norms[1](self.second(y))
        if self.shortcut is not None:
            x = self.norms[2](self.shortcut(x))
        return nnx.relu(x + y)


class NNXResNet18(nnx.Module):
    """ResNet-18 of width 16 in NNX."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(16, use_running_average=True, rngs=rngs)
        blocks, inputs = [], 16
        for stage, features in enumerate((16, 32, 64, 128)):
            for block in range(2):
                blocks.append(NNXBlock(inputs, features, 2 if stage and not block else 1, rngs))
                inputs = features
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits."""
        x = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def linen() -> Network:
    """Flax Linen's `nn.Conv`."""
    model = LinenResNet18()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return lambda x: model.apply(variables, x)


def flax_nnx() -> Network:
    """A lambda over an NNX module."""
    model = NNXResNet18(nnx.Rngs(0))
    model.eval()
    return lambda x: model(x)  # noqa: PLW0108 (what people write)


def plain() -> Network:
    """Four `lax.conv_general_dilated`, NHWC."""
    rng, channels = np.random.default_rng(0), (3, 32, 64, 64, 128)
    shapes = [(3, 3, *pair) for pair in itertools.pairwise(channels)]
    kernels = [jnp.asarray(rng.normal(size=s) / np.sqrt(9 * s[2]), jnp.float32) for s in shapes]
    head = jnp.asarray(rng.normal(size=(128, 10)) / 11, jnp.float32)

    def logits_fn(x: jax.Array) -> jax.Array:
        for kernel, stride in zip(kernels, (1, 2, 1, 2), strict=True):
            layout = ("NHWC", "HWIO", "NHWC")
            strides = (stride, stride)
            x = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout)
            x = jax.nn.relu(x)
        return x.mean((1, 2)) @ head

    return logits_fn


def equinox() -> Network:
    """Four of Equinox's convolutions, NCHW, one image at a time under `vmap`."""
    keys, channels = jax.random.split(jax.random.key(0), 5), (3, 32, 64, 64, 128)
    convolutions = [
        eqx.nn.Conv2d(*pair, 3, stride, 1, key=key)
        for pair, stride, key in zip(
            itertools.pairwise(channels), (1, 2, 1, 2), keys[:4], strict=True
        )
    ]
    head = eqx.nn.Linear(128, 10, key=keys[4])

    def one(image: jax.Array) -> jax.Array:
        features = image.transpose(2, 0, 1)
        for convolution in convolutions:
            features = jax.nn.relu(convolution(features))
        return head(features.mean((1, 2)))

    return jax.vmap(one)


NETWORKS = {
    "Flax Linen, ResNet-18 of width 16": linen,
    "Flax NNX, ResNet-18 of width 16": flax_nnx,
    "lax.conv, NHWC, four layers": plain,
    "Equinox, NCHW, four layers": equinox,
}


def naive(network: Network, images: jax.Array, labels: jax.Array) -> Callable[[], jax.Array]:
    """What everyone writes."""
    gradient = jax.jit(jax.grad(lambda x: losses.cross_entropy(network(x), labels).sum()))

    @jax.jit
    def step(points: jax.Array, gradient: jax.Array) -> jax.Array:
        moved = points + STEP * jnp.sign(gradient)
        return jnp.clip(images + jnp.clip(moved - images, -EPSILON, EPSILON), 0, 1)

    def loop() -> jax.Array:
        points = images
        for _ in range(STEPS):
            points = step(points, gradient(points))
        return points

    return loop


def contenders(network: Network, images: jax.Array, labels: jax.Array) -> dict[str, Any]:
    """What is timed, by its column."""
    attack = pgd(Linf(EPSILON), steps=STEPS, step_size=STEP, random_start=False)
    key = jax.random.key(0)
    within = jax.jit(lambda x: attack(network, x, labels, key))

    @jax.jit
    def as_it_is(x: jax.Array) -> jax.Array:
        def step(_: int, points: jax.Array) -> jax.Array:
            gradient = jax.grad(lambda z: losses.cross_entropy(network(z), labels).sum())(points)
            moved = points + STEP * jnp.sign(gradient)
            return jnp.clip(x + jnp.clip(moved - x, -EPSILON, EPSILON), 0, 1)

        return jax.lax.fori_loop(0, STEPS, step, x)

    return {
        "naive": naive(network, images, labels),
        "attack": lambda: attack(network, images, labels, key),
        "in jit": lambda: within(images),
        "with library": with_library(lambda: attack(network, images, labels, key), kept=True),
        "not rewritten": lambda: as_it_is(images),
    }


def with_library(function: Callable[[], Any], *, kept: bool) -> Callable[[], Any]:
    """The function, with XLA's default library for convolutions kept or left out in attacks."""
    original = calling._jit

    def chosen(function: Any, constants: Any, *, leave_out_library: bool) -> Any:
        return original(function, constants, leave_out_library=not kept)

    def run() -> Any:
        with mock.patch.object(calling, "_jit", chosen):
            return function()

    return run


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    jax.block_until_ready(function())
    return time.process_time() - cpu, time.perf_counter() - wall


def in_turns(functions: dict[str, Any], turns: int) -> dict[str, list[tuple[float, float]]]:
    """Each once for nothing, then all of them in each turn."""
    for function in functions.values():
        jax.block_until_ready(function())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(turns):
        for name, function in functions.items():
            found[name].append(timed(function))
    return found


def ratios(found: dict[str, list[tuple[float, float]]], base: str) -> dict[str, str]:
    """Of CPU seconds and (wall seconds) to the base's, paired, the median over turns."""
    texts = {}
    for name, times in found.items():
        cpu, wall = (
            statistics.median(
                one[which] / other[which] for one, other in zip(times, found[base], strict=True)
            )
            for which in (0, 1)
        )
        texts[name] = f"{cpu:.2f} ({wall:.2f})"
    seconds = statistics.median(cpu for cpu, _ in found[base])
    return {**texts, base: f"{seconds:.2f} s"}


def speed(options: argparse.Namespace) -> None:
    """PGD-20 on each network."""
    images = jax.random.uniform(jax.random.key(1), (options.batch, 32, 32, 3))
    columns: list[str] = []
    for name, make in NETWORKS.items():
        network = make()
        labels = jax.jit(network)(images).argmax(1)
        row = ratios(in_turns(contenders(network, images, labels), options.turns), "naive")
        if not columns:
            columns = list(row)
            print("| network | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        print(f"| {name} | " + " | ".join(row.values()) + " |", flush=True)


def recompilation(options: argparse.Namespace) -> None:
    """Twenty calls with a fresh callable, against twenty with one `Partial`."""
    model = nn.Sequential(
        [
            nn.Conv(16, (3, 3)),
            nn.relu,
            nn.Conv(32, (3, 3), (2, 2)),
            nn.relu,
            lambda x: x.reshape(len(x), -1),
            nn.Dense(10),
        ]
    )
    images = jax.random.uniform(jax.random.key(1), (16, 16, 16, 3))
    variables, labels = model.init(jax.random.key(0), images), jnp.zeros(16, int)
    attack = pgd(Linf(EPSILON), steps=3, step_size=STEP)
    one = jax.tree_util.Partial(model.apply, variables)
    makers: dict[str, Callable[[], Any]] = {
        "one Partial": lambda: one,
        "fresh lambda": lambda: lambda x: model.apply(variables, x),
        "fresh functools.partial": lambda: functools.partial(model.apply, variables),
    }

    def calls(make: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: [attack(make(), images, labels, jax.random.key(0)) for _ in range(20)]

    found = in_turns({name: calls(make) for name, make in makers.items()}, options.turns)
    print("20 calls, of one Partial:", ratios(found, "one Partial"))


def whole_autoattack(options: argparse.Namespace) -> None:
    """AutoAttack `standard` with this library's convolution and with Flax's."""
    weights = dict(np.load(options.golden / "weights_cifar_cnn_a_adv.npz"))
    stored = np.load(options.golden / "images.npz")
    images = stored["cifar_x"][: options.examples].astype(np.float32) / 255
    labels = stored["cifar_y"][: options.examples].astype(np.int32)
    kernels = [jnp.asarray(weights[f"{i}.weight"].transpose(2, 3, 1, 0)) for i in (0, 2)]
    convolution = functools.partial(nn.Conv, kernel_size=(4, 4), strides=2, padding=1)
    layers = [convolution(16), convolution(32)]

    def by_flax(x: jax.Array, index: int) -> jax.Array:
        leaves = {"kernel": kernels[index], "bias": weights[f"{2 * index}.bias"]}
        return layers[index].apply({"params": leaves}, x)

    def by_library(x: jax.Array, index: int) -> jax.Array:
        bias = weights[f"{2 * index}.bias"][None, None, None]
        return convolve(x, kernels[index], stride=2, padding=1, implementation="canonical") + bias

    def network(convolve: Any) -> Network:
        def logits_fn(x: jax.Array) -> jax.Array:
            x = (x - weights["mean"][None, None, None]) / weights["std"][None, None, None]
            for index in range(2):
                x = jax.nn.relu(convolve(x, index))
            x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            x = jax.nn.relu(x @ weights["5.weight"].T + weights["5.bias"][None])
            return x @ weights["7.weight"].T + weights["7.bias"][None]

        return logits_fn

    results: dict[str, Any] = {}

    def evaluate(name: str, convolve: Any) -> Callable[[], Any]:
        def run() -> None:
            attack = autoattack(Linf(EPSILON))
            results[name] = attack.evaluate(
                network(convolve), images, labels, jax.random.key(0), progress=False
            )

        return run

    functions = {name: evaluate(name, f) for name, f in (("own", by_library), ("Flax", by_flax))}
    functions["own, without XLA's library"] = with_library(functions["own"], kept=False)
    functions["own, with it"] = with_library(functions["own"], kept=True)
    found = in_turns(functions, options.turns)
    print("AutoAttack standard, of the own network:", ratios(found, "own"))
    same = int((results["own"].robust == results["Flax"].robust).sum())
    print(f"same verdict: {same} of {len(labels)}; robust {results['own'].robust.sum()}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--recompile", action="store_true")
    parser.add_argument("--autoattack", action="store_true")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    options = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {STEPS} steps, CPU (wall)")
    jobs = [recompilation] * options.recompile + [whole_autoattack] * options.autoattack
    for job in jobs or [speed]:
        job(options)


if __name__ == "__main__":
    main()
