"""Adversarial training with AGR on CIFAR-100, PreAct-ResNet-18.

Source: the paper's section 5 (200 epochs, PGD-10, epsilon 8/255, step 2/255); the method:
        Madry et al., ICLR 2018.
Command: python launch.py --config=configs/cifar100_at.py
         python launch.py --config=configs/cifar100_at.py --config.agr.enabled=False
         (the baseline)
         --config.model.name=wrn34_10 trains the paper's larger network.
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: 29 GFLOP an image and step (26 forward passes), 50,000 images, 200 epochs:
      2.9e17 FLOP. Time on an accelerator: not measured (benchmarks/train_step.py).
Result: not measured at this scale; docs/results.md has smaller runs.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    return base.recipe("cifar100", "at", profile)
