"""The same AGR training step in PyTorch, for `train_step.py` to compare with. Needs torch alone."""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Pre-activation residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps features to features."""
        activated = functional.relu(self.bn1(features))
        shortcut = features if self.shortcut is None else self.shortcut(activated)
        out = self.conv1(activated)
        return self.conv2(functional.relu(self.bn2(out))) + shortcut


class PreActResNet18(nn.Module):
    """PreAct-ResNet-18 for 32x32 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        blocks, inputs = [], width
        for stage in range(4):
            for index in range(2):
                outputs = width * 2**stage
                blocks.append(Block(inputs, outputs, 2 if stage and index == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images to logits."""
        features = functional.relu(self.bn(self.blocks(self.conv(images))))
        return self.linear(features.mean((2, 3)))


def attack(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """PGD-10, L-infinity 8/255, step 2/255, in evaluation mode."""
    model.eval()
    epsilon = 8 / 255
    points = (images + torch.empty_like(images).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(10):
        points.requires_grad_(True)
        loss = functional.cross_entropy(model(points), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        moved = points.detach() + 2 / 255 * gradient.sign()
        points = torch.clamp(images + (moved - images).clamp(-epsilon, epsilon), 0, 1)
    model.train()
    return points


def combine(clean: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """AGR on one leaf, clipped at 0.1."""
    dot = (clean * adversarial).sum()
    cosine = dot / (clean.norm() * adversarial.norm() + 1e-20)
    projected = adversarial - dot / (clean.norm() ** 2 + 1e-20) * clean
    mixed = cosine * clean + (1 - cosine) * adversarial
    out = torch.where(cosine < 0, projected, mixed)
    return out * torch.clamp(0.1 / (out.norm() + 1e-20), max=1)


def main() -> None:
    """Times the step and prints JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--precision", choices=["float32", "tf32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(options.device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    tf32 = options.precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    model = PreActResNet18(options.width).to(device, memory_format=layout)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.rand(options.batch, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.arange(options.batch, device=device) % 10
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16")

    def step() -> None:
        with mixed:
            adversarial = attack(model, images, labels)
            loss = functional.cross_entropy(model(images), labels)
        clean_grads = torch.autograd.grad(loss, parameters)
        with mixed:
            loss = functional.cross_entropy(model(adversarial), labels)
        adversarial_grads = torch.autograd.grad(loss, parameters)
        for leaf, clean, adv in zip(parameters, clean_grads, adversarial_grads, strict=True):
            leaf.grad = combine(clean, adv)
        optimizer.step()

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    step()
    finish()
    first = time.perf_counter() - started
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.steps):
        step()
    finish()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    times = {"first_step": first, "wall": wall / options.steps, "cpu": cpu / options.steps}
    print(json.dumps({**times, "device": f"{name}, PyTorch {torch.__version__}"}))


if __name__ == "__main__":
    main()
