"""Adversarial training with AGR on CIFAR-10 in the L2 ball of radius 128/255.

Source: the recipe of `cifar10_at.py` with the attack of Rice et al., "Overfitting in adversarially
        robust deep learning", ICML 2020: PGD-10 with steps of 15/255. Not in the AGR paper, which
        evaluates networks trained in L-infinity in this ball.
Command: python launch.py --config=configs/cifar10_at_l2.py
         python launch.py --config=configs/cifar10_at_l2.py --config.agr.enabled=False
         (the baseline)
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: as `cifar10_at.py`. Another radius needs another step: 2.5 epsilon over the steps is usual.
Result: not measured.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    config = base.recipe("cifar10", "at", profile)
    config.name = "cifar10_at_l2"
    config.attack.norm = "l2"
    config.attack.epsilon = 128 / 255
    config.attack.step_size = config.eval.step_size = 15 / 255
    return config
