"""Standard training on CIFAR-10, PreAct-ResNet-18.

Source: the paper's section 5, recipe of its adversarial training.
Command: python launch.py --config=configs/cifar10_standard.py
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: 3.3 GFLOP an image and step (3 forward passes), 50,000 images, 200 epochs:
      3.3e16 FLOP. Time on an accelerator: not measured (benchmarks/train_step.py).
Result: not measured at this scale; docs/results.md has smaller runs.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    return base.recipe("cifar10", "standard", profile)
