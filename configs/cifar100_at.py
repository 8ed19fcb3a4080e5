"""Adversarial training with AGR on CIFAR-100, PreAct-ResNet-18.

Source: the paper's section 5 (200 epochs, PGD-10, epsilon 8/255, step 2/255).
Command: python launch.py --config=configs/cifar100_at.py
         python launch.py --config=configs/cifar100_at.py --config.agr.enabled=False   (baseline)
Profiles: paper (default), official (bug-compatible with the published code), best.
Cost: 29 GFLOP an image and AGR step, 50,000 images an epoch, 200 epochs: 2.9e17 FLOP. Time on an
      accelerator: not measured (benchmarks/train_step.py measures a step).
Result: not measured at this scale (docs/results.md has what was run);
        the paper's are in its Table 1.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The paper's recipe on CIFAR-100."""
    config = base.recipe(profile)
    config.name = "cifar100_at"
    config.data.name = "cifar100"
    return config
