"""TRADES with AGR on Tiny ImageNet, PreAct-ResNet-18.

Source: the paper's section 5 (200 epochs, PGD-10, epsilon 8/255, step 2/255); the method:
        Zhang et al., ICML 2019.
Command: python launch.py --config=configs/tinyimagenet_trades.py
         python launch.py --config=configs/tinyimagenet_trades.py --config.agr.enabled=False
         (the baseline)
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: 33.4 GFLOP an image and step (30 forward passes), 100,000 images, 200 epochs:
      6.7e17 FLOP. Time on an accelerator: not measured (benchmarks/train_step.py).
Result: not measured at this scale; docs/results.md has smaller runs.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    return base.recipe("tinyimagenet", "trades", profile)
