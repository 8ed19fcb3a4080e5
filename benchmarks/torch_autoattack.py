"""The published AutoAttack in PyTorch, for `autoattack.py` to compare with.

Needs torch, and a clone of https://github.com/fra31/auto-attack. Speaks JSON, a line for a line:
first what to attack, then one attack after the other. The weights need no gradient here, which
spares the reference some work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch_train_step import PreActResNet18


class Normalised(nn.Module):
    """A network behind its input normalisation."""

    def __init__(self, network: nn.Module, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.network = network
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value).float().reshape(1, -1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images in [0, 1] to logits."""
        return self.network((images - self.mean) / self.std)


def cnn(weights: dict[str, torch.Tensor]) -> nn.Module:
    """Two convolutions and two linear layers, in the sizes of their weights."""
    layers: list[nn.Module] = []
    for index in (0, 2):
        outputs, inputs = weights[f"{index}.weight"].shape[:2]
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
    layers.append(nn.Flatten())
    for index in (5, 7):
        outputs, inputs = weights[f"{index}.weight"].shape
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network


def preactresnet18(weights: dict[str, torch.Tensor]) -> nn.Module:
    """The network of `torch_train_step.py`, from weights with the published names."""
    classes, features = weights["linear.weight"].shape
    network = PreActResNet18(weights["conv1.weight"].shape[0])
    network.linear = nn.Linear(features, classes)

    def renamed(name: str) -> str:
        if block := re.fullmatch(r"layer(\d)\.(\d)\.(.*)", name):
            place = 2 * (int(block[1]) - 1) + int(block[2])
            return f"blocks.{place}.{block[3].replace('shortcut.0', 'shortcut')}"
        return name.replace("conv1", "conv")

    network.load_state_dict({renamed(name): value for name, value in weights.items()})
    return network


class Contender:
    """The reference with one network and its images.

    Args:
        setup: `network`, files `weights` and `images` (`.npz`), `mean` and `std`, `norm`,
            `epsilon`, `batch_size`.
        device: `cpu` or `cuda`.
    """

    def __init__(self, setup: dict[str, Any], device: str) -> None:
        from autoattack import AutoAttack

        with np.load(setup["weights"], allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        tensors = {n: torch.tensor(a) for n, a in arrays.items() if re.search(r"\.[a-z_]+$", n)}
        make = {"cnn": cnn, "preactresnet18": preactresnet18}[setup["network"]]
        self.model = Normalised(make(tensors), setup["mean"], setup["std"])
        self.model.eval().requires_grad_(False).to(device)
        with np.load(setup["images"], allow_pickle=False) as file:
            self.images = torch.tensor(file["images"].transpose(0, 3, 1, 2).copy(), device=device)
        # Its settings of "standard" stay when the attacks are then chosen one by one.
        self.attack = AutoAttack(
            self.model,
            norm=setup["norm"],
            eps=setup["epsilon"],
            seed=0,
            version="standard",
            device=device,
            verbose=False,
        )
        self.attack.version = "custom"
        self.batch_size = setup["batch_size"]

    def logits(self, count: int) -> list[list[float]]:
        """Of the first images."""
        with torch.no_grad():
            return self.model(self.images[:count]).tolist()

    def run(self, name: str, labels: list[int]) -> dict[str, Any]:
        """Times one attack, its checks included, on the images that are classified as `labels`."""
        given = torch.tensor(labels, device=self.images.device)
        self.attack.attacks_to_run = [name]
        wall, cpu = time.perf_counter(), time.process_time()
        _, predictions = self.attack.run_standard_evaluation(
            self.images, given, bs=self.batch_size, return_labels=True
        )
        if self.images.is_cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall, "cpu": cpu, "robust": predictions.eq(given).tolist()}


def main() -> None:
    """Answers requests until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--reference", required=True, help="clone of fra31/auto-attack")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    # The reference prints; what it prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, options.reference)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # as ours, which attacks in float32

    def answer(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=answers, flush=True)

    contender = Contender(json.loads(sys.stdin.readline()), options.device)
    answer({"torch": torch.__version__, "logits": contender.logits(16)})
    for line in sys.stdin:
        request = json.loads(line)
        answer(contender.run(request["attack"], request["labels"]))


if __name__ == "__main__":
    main()
