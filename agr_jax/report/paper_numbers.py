"""What the paper reports, as far as it is known here, and what a run at its scale would cost.

The paper's tables are not part of this project. `REPORTED` holds the numbers that our notes on the
paper quote; all others are shown as a dash. Whoever has the paper at hand may add them.
"""

from __future__ import annotations

from agr_jax.attacks import named

# (table, data set, method, arm) -> {attack: percent}.
REPORTED: dict[tuple[str, str, str, str], dict[str, float]] = {
    ("table3", "cifar10", "at", "agr_no_gop"): {"clean": 86.14, "pgd20": 46.42},
    ("table3", "cifar10", "at", "agr"): {"clean": 86.22, "pgd20": 46.85},
    ("table4", "cifar10", "at", "tau_0.9"): {"pgd20": 48.42},
    ("table4", "cifar10", "at", "agr"): {"clean": 86.22, "pgd20": 46.85},
    ("table1", "tiny_imagenet", "at", "agr"): {"autoattack": 6.48},
    ("table1", "tiny_imagenet", "trades", "agr"): {"autoattack": 6.48},
}
# The last two are one and the same number in the paper, which may be a slip.

COLUMNS = {
    "table1": named.TABLES["table1"],
    "table2": named.TABLES["table2"],
    "table3": ("clean", "pgd20"),
    "table4": ("clean", "pgd20"),
}
DATA_SETS = ("cifar10", "cifar100", "tiny_imagenet")
MODELS = ("preactresnet18", "wrn34_10")
METHODS = ("at", "trades", "mart")
ROWS: dict[str, tuple[str, ...]] = {
    "table1": ("off", "agr"),
    "table2": ("off", "agr"),
    "table3": ("agr_no_gop", "agr"),
    "table4": ("mean", "tau_0.9", "agr"),
}

# Of one 32 x 32 image, multiplications and additions counted apart.
FORWARD_GFLOP = {"preactresnet18": 1.11, "wrn34_10": 10.5}
TRAINING_IMAGES = {"cifar10": 50_000, "cifar100": 50_000, "tiny_imagenet": 100_000}
EPOCHS = 200
# A backward pass to the images counts as one forward pass, one to weights and images as two.
PASSES = {"off": 2 * 10 + 4, "agr": 2 * 10 + 6}
# Of a training step of PreAct-ResNet-18 on one H200 with TF32 products: docs/speed.md.
MEASURED_TFLOPS = 129.0


def device_hours(data: str, model: str, arm: str, runs: int = 3) -> float:
    """Hours of training on one H200 at the paper's scale, at the rate of PreAct-ResNet-18.

    Args:
        data: data set.
        model: network.
        arm: `off`, or another one, which takes the clean gradient too.
        runs: repetitions.
    """
    passes = PASSES["off" if arm == "off" else "agr"]
    images = TRAINING_IMAGES[data] * EPOCHS * runs
    return images * passes * FORWARD_GFLOP[model] / (MEASURED_TFLOPS * 1000) / 3600


def reported(table: str, data: str, model: str, method: str, arm: str) -> dict[str, float]:
    """The paper's percentages of one row that are known here; they are PreAct-ResNet-18's."""
    return REPORTED.get((table, data, method, arm), {}) if model == "preactresnet18" else {}
