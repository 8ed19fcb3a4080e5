"""AutoAttack next to the published PyTorch code: the same network and images on the same cores.

    python benchmarks/autoattack.py --golden=FOLDER                                # ours only
    python benchmarks/autoattack.py --network=preactresnet18 --run=runs/cifar10_at --examples=100
    python benchmarks/autoattack.py --torch-python=OTHER/bin/python --reference=CLONE

`--torch-python` is the Python of an environment with PyTorch, `--reference` a clone of
https://github.com/fra31/auto-attack; neither is part of this repository. FOLDER holds
`weights_cifar_cnn_a_adv.npz` (two convolutions of stride 2, two linear layers) and `images.npz`.

The settings are those of `standard`. Each attack is timed on the images that the attacks before it
left, ours and theirs in turns; a ratio is the median over turns, paired. The images that are not
left are given a wrong label, so both sides draw and batch as in one whole evaluation. The clean
pass and the checks before an attack are timed apart and subtracted. Our first turn compiles: it
counts in the last column alone. CPU seconds (user and system, over all cores) are what a busy
machine disturbs least. On a machine with other work give PyTorch `OMP_WAIT_POLICY=PASSIVE`: its
threads spin while they wait for each other, which is fastest on idle cores (where PASSIVE costs
it almost half its speed) and many times slower on busy ones. ACTIVE would disturb our turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GOLDEN = ROOT.parent / "shared" / "golden"
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
EPSILONS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}
CHECKS, TOTAL = "clean and checks", "standard"


class Problem(NamedTuple):
    """What is attacked.

    Attributes:
        classifier: from images to logits, a pytree.
        weights: file of PyTorch-named weights.
        mean: of the input normalisation, per channel.
        std: as `mean`.
        images: float32 `[examples, height, width, channels]` in [0, 1].
        labels: integers `[examples]`.
    """

    classifier: Any
    weights: Path
    mean: Sequence[float]
    std: Sequence[float]
    images: np.ndarray
    labels: np.ndarray


class Target(NamedTuple):
    """What a network says about its images without an attack.

    Attributes:
        labels: integers `[examples]`.
        correct: booleans `[examples]`.
        wrong: labels with which the network is wrong, so that no attack spends time on an image.
    """

    labels: np.ndarray
    correct: np.ndarray
    wrong: np.ndarray

    @classmethod
    def of(cls, problem: Problem) -> Target:
        """By a clean pass."""
        import jax

        forward, batches = jax.jit(problem.classifier), range(0, len(problem.labels), 250)
        logits = np.concatenate([forward(problem.images[start : start + 250]) for start in batches])
        predictions = logits.argmax(1).astype(np.int32)
        wrong = (predictions + 1) % logits.shape[1]
        return cls(problem.labels, predictions == problem.labels, wrong.astype(np.int32))


class Timing(NamedTuple):
    """Seconds of one piece of work."""

    wall: float
    cpu: float

    def without(self, other: Timing) -> Timing:
        """What is left when another piece of work is taken out."""
        return Timing(self.wall - other.wall, self.cpu - other.cpu)


class Turn(NamedTuple):
    """One sequence of attacks.

    Attributes:
        timings: by `CHECKS` and the attacks.
        robust: booleans `[examples]`, after each of them.
    """

    timings: dict[str, Timing]
    robust: dict[str, np.ndarray]


class Contender(Protocol):
    """Either side."""

    def run(self, name: str, labels: np.ndarray) -> tuple[Timing, np.ndarray]:
        """Checks, then one attack on the images classified as `labels`; which withstand it."""
        ...


class Ours:
    """`agr_jax.attacks.AutoAttack`."""

    def __init__(self, problem: Problem, options: argparse.Namespace) -> None:
        from agr_jax import sharding, threat

        self.problem = problem
        self.threat = getattr(threat, NORMS[options.norm])(options.epsilon)
        self.batch_size = options.batch_size
        self.on = sharding.data_mesh() if options.devices > 1 else None

    def run(self, name: str, labels: np.ndarray) -> tuple[Timing, np.ndarray]:
        """See `Contender`."""
        import jax

        from agr_jax.attacks import AutoAttack

        attack = AutoAttack(
            self.threat, version="custom", attacks=(name,), batch_size=self.batch_size
        )
        problem = self.problem
        wall, cpu = time.perf_counter(), time.process_time()
        result = attack.evaluate(
            problem.classifier,
            problem.images,
            labels,
            jax.random.key(0),
            on=self.on,
            progress=False,
        )
        timing = Timing(time.perf_counter() - wall, time.process_time() - cpu)
        return timing, result.robust


class Theirs:
    """The published code, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line there, one line back."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: the PyTorch process ended; its own message is above")
        return json.loads(line)

    def run(self, name: str, labels: np.ndarray) -> tuple[Timing, np.ndarray]:
        """See `Contender`."""
        found = self.ask({"attack": name, "labels": labels.tolist()})
        return Timing(found["wall"], found["cpu"]), np.asarray(found["robust"])


@contextlib.contextmanager
def start_theirs(
    problem: Problem, options: argparse.Namespace, folder: Path
) -> Iterator[tuple[Theirs, str]]:
    """The PyTorch process with the same network, and the version of PyTorch."""
    np.savez(folder / "images.npz", images=problem.images)
    command = [options.torch_python, str(HERE / "torch_autoattack.py")]
    command += [f"--reference={options.reference}", f"--threads={cores()}"]
    setup = {
        "network": options.network,
        "weights": str(problem.weights),
        "images": str(folder / "images.npz"),
        "mean": list(map(float, problem.mean)),
        "std": list(map(float, problem.std)),
        "norm": NORMS[options.norm],
        "epsilon": options.epsilon,
        "batch_size": options.batch_size,
    }
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        theirs = Theirs(process)
        about = theirs.ask(setup)
        logits = np.asarray(about["logits"])
        ours = np.asarray(problem.classifier(problem.images[: len(logits)]))
        error = np.abs(ours - logits).max() / np.abs(logits).max()
        if not error < 1e-4:
            raise SystemExit(f"error: the two networks differ, by {error:.2g} of their logits")
        yield theirs, about["torch"]


def cnn(options: argparse.Namespace) -> Problem:
    """The small trained network, and the images that it came with."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    def forward(weights: dict[str, jax.Array], features: jax.Array) -> jax.Array:
        features = (features - weights["mean"]) / weights["std"]
        for name in ("0", "2"):
            features = lax.conv_general_dilated(
                features,
                weights[f"{name}.weight"],
                window_strides=(2, 2),
                padding=((1, 1), (1, 1)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            features = jax.nn.relu(features + weights[f"{name}.bias"])
        hidden = features.reshape(features.shape[0], -1) @ weights["5.weight"] + weights["5.bias"]
        return jax.nn.relu(hidden) @ weights["7.weight"] + weights["7.bias"]

    path = Path(options.golden) / "weights_cifar_cnn_a_adv.npz"
    with np.load(path, allow_pickle=False) as file:
        stored = {name: file[name] for name in file.files}
    weights = {name: stored[name] for name in ("mean", "std")}
    for name in ("0", "2", "5", "7"):
        weights[f"{name}.bias"] = stored[f"{name}.bias"]
    for name in ("0", "2"):
        weights[f"{name}.weight"] = stored[f"{name}.weight"].transpose(2, 3, 1, 0)
    # PyTorch flattens channels first.
    first = stored["5.weight"]
    channels = stored["2.weight"].shape[0]
    side = round((first.shape[1] / channels) ** 0.5)
    first = first.reshape(-1, channels, side, side).transpose(2, 3, 1, 0)
    weights["5.weight"] = first.reshape(-1, first.shape[-1])
    weights["7.weight"] = stored["7.weight"].T
    with np.load(Path(options.golden) / "images.npz", allow_pickle=False) as file:
        images, labels = file["cifar_x"], file["cifar_y"]
    classifier = jax.tree_util.Partial(forward, {k: jnp.asarray(v) for k, v in weights.items()})
    return Problem(
        classifier, path, stored["mean"], stored["std"], to_floats(images), labels.astype(np.int32)
    )


def preactresnet18(options: argparse.Namespace, folder: Path) -> Problem:
    """A run's last checkpoint and its test images, or random weights and images.

    The labels of a random network are its own predictions: there is something to attack.
    """
    import jax
    import jax.numpy as jnp

    from agr_jax import data, interop, models, sharding
    from agr_jax.data.dataset import representative_order
    from agr_jax.runs import Run, checkpoints
    from agr_jax.runs.folder import read_config

    if options.run:
        folder = Path(options.run)
        config = read_config(folder)
        one_device = sharding.data_mesh(jax.devices()[:1])
        run = Run(config, folder, data.from_config(config), one_device)
        classifier, _ = run.load_classifier(checkpoints.find(folder))
        test = run.dataset.test.take(representative_order(run.dataset.test))
        images, labels = to_floats(test.images), test.labels
    else:
        model = models.create("preactresnet18", 10, width=options.width)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros([1, 32, 32, 3]))
        classifier = models.Classifier(model, variables)
        draws = np.random.default_rng(0).integers(0, 256, (options.examples or 500, 32, 32, 3))
        images = to_floats(draws)
        labels = np.asarray(jax.jit(classifier)(images).argmax(1).astype(np.int32))
    classifier = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), classifier)  # on no mesh
    model, path = classifier.model, folder / "weights.npz"
    interop.save_torch_weights(path, model, classifier.variables)
    return Problem(classifier, path, model.mean, model.std, images, labels)


def to_floats(images: np.ndarray) -> np.ndarray:
    """Of 0..255, in [0, 1]."""
    return images.astype(np.float32) / np.float32(255)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def take_turn(
    contenders: Sequence[Contender], target: Target, attacks: Sequence[str]
) -> list[Turn]:
    """One sequence of attacks on each side, an attack at a time."""
    turns = []
    for contender in contenders:
        checks, _ = contender.run(attacks[0], target.wrong)
        turns.append(Turn({CHECKS: checks}, {CHECKS: target.correct}))
    for name in attacks:
        for contender, turn in zip(contenders, turns, strict=True):
            left = list(turn.robust.values())[-1]
            turn.timings[name], turn.robust[name] = Timing(0, 0), left
            if left.any():
                labels = np.where(left, target.labels, target.wrong)
                timing, robust = contender.run(name, labels)
                turn.timings[name] = timing.without(turn.timings[CHECKS])
                turn.robust[name] = left & robust
    return turns


def compilation(ours: Ours, target: Target, attacks: Sequence[str]) -> dict[str, Timing]:
    """Our first turn, from which the warm turns are taken to say what compilation took."""
    first, _ = ours.run(attacks[0], target.wrong)
    (turn,) = take_turn([ours], target, attacks)
    return {**turn.timings, CHECKS: first}


def median(values: Iterable[float]) -> float:
    """Of those that are numbers."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def total(turn: Turn) -> Turn:
    """With a row for the whole evaluation, in which the checks come once."""
    whole = Timing(*map(sum, zip(*turn.timings.values(), strict=True)))
    robust = list(turn.robust.values())[-1]
    return Turn({**turn.timings, TOTAL: whole}, {**turn.robust, TOTAL: robust})


def table(cold: dict[str, Timing], ours: Sequence[Turn], theirs: Sequence[Turn]) -> str:
    """Markdown: medians over turns; ratios are medians of ratios within a turn."""
    header = ["", "robust, ours", "wall s, ours", "CPU s, ours", "compilation CPU s, ours"]
    if theirs:
        header[2:2] = ["theirs"]
        header[4:4] = ["theirs", "ratio"]
        header[7:7] = ["theirs", "ratio"]
    lines = [header, ["---"] * len(header)]
    for name in ours[0].timings:
        robust = [int(side[0].robust[name].sum()) for side in (ours, theirs) if side]
        row = [name, *map(str, robust)]
        for field in Timing._fields:
            mine = [getattr(turn.timings[name], field) for turn in ours]
            other = [getattr(turn.timings[name], field) for turn in theirs]
            row.append(f"{median(mine):.2f}")
            if theirs:
                pairs = zip(mine, other, strict=True)
                ratio = median(m / o if m and o else math.nan for m, o in pairs)
                row += [f"{median(other):.2f}", f"{ratio:.2f}"]
        warm = median(turn.timings[name].cpu for turn in ours)
        row.append(f"{max(cold[name].cpu - warm, 0):.1f}")
        lines.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=["cnn", "preactresnet18"], default="cnn")
    parser.add_argument("--golden", default=str(GOLDEN), help="folder with the weights of cnn")
    parser.add_argument("--run", default="", help="run folder of preactresnet18")
    parser.add_argument("--width", type=int, default=16, help="of preactresnet18 without --run")
    parser.add_argument("--examples", type=int, default=0, help="number of test images; 0 for all")
    parser.add_argument("--norm", choices=list(NORMS), default="linf")
    parser.add_argument("--epsilon", type=float, help="8/255, 0.5 and 12 for linf, l2 and l1")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--devices", type=int, default=1, help="that JAX divides the cores into")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--attacks", nargs="+", choices=STANDARD, default=list(STANDARD))
    parser.add_argument("--torch-python", default="", help="Python that can import torch")
    parser.add_argument("--reference", default="", help="clone of fra31/auto-attack")
    options = parser.parse_args()
    if bool(options.torch_python) != bool(options.reference):
        parser.error("--torch-python and --reference go together")
    if options.reference and not (Path(options.reference) / "autoattack").is_dir():
        parser.error(f"--reference: {options.reference} is no clone of fra31/auto-attack")
    if options.turns < 1:
        parser.error("--turns must be at least 1")
    if options.network == "cnn" and not Path(options.golden).is_dir():
        parser.error(f"--golden: there is no folder {options.golden}")
    options.epsilon = EPSILONS[options.norm] if options.epsilon is None else options.epsilon

    return options


def main() -> None:
    """Lets the two sides take turns and prints a table."""
    options = parse()
    os.environ["JAX_NUM_CPU_DEVICES"] = str(options.devices)
    sys.path.insert(0, str(ROOT))
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_default_matmul_precision", "float32")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problem = cnn(options) if options.network == "cnn" else preactresnet18(options, folder)
        if options.examples:
            count = options.examples
            problem = problem._replace(images=problem.images[:count], labels=problem.labels[:count])
        target = Target.of(problem)
        ours = Ours(problem, options)
        contenders: list[Contender] = [ours]
        versions = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        if options.torch_python:
            theirs, torch = stack.enter_context(start_theirs(problem, options, folder))
            contenders.append(theirs)
            waiting = os.environ.get("OMP_WAIT_POLICY", "unset")
            versions += f", torch {torch} (OMP_WAIT_POLICY {waiting})"
        load = os.getloadavg()[0]
        cold = compilation(ours, target, options.attacks)
        sides: list[list[Turn]] = [[] for _ in contenders]
        for index in range(options.turns):
            # Who comes first changes from turn to turn.
            order = -1 if index % 2 else 1
            turns = take_turn(contenders[::order], target, options.attacks)[::order]
            for side, turn in zip(sides, turns, strict=True):
                side.append(total(turn))
    cold[TOTAL] = Timing(*map(sum, zip(*cold.values(), strict=True)))
    print(
        f"{options.network}, {NORMS[options.norm]} {options.epsilon:.4g}, "
        f"{len(problem.labels)} images, batch {options.batch_size}, {cores()} cores, "
        f"{options.devices} JAX devices, {options.turns} turns, {versions}, "
        f"load before {load:.1f}\n"
    )
    print(table(cold, sides[0], sides[1] if len(sides) > 1 else ()))
    if len(sides) > 1:
        last = [side[0].robust[TOTAL] for side in sides]
        print(f"\nimages with different verdicts: {int((last[0] != last[1]).sum())}")


if __name__ == "__main__":
    main()
