"""Adversarial training with AGR on scikit-learn's digits: the whole path in a minute, no download.

A smoke test, never evidence: 1,797 images of 8x8 pixels, epsilon 0.15.
Source: the paper's recipe with a fifth of its epochs; epsilon as large as these images need.
Command: python launch.py --config=configs/digits_at.py
         python launch.py --config=configs/digits_at.py --config.agr.enabled=False   (baseline)
         python launch.py --config=configs/digits_at.py --config.method=standard \
             --config.agr.enabled=False                                   (standard training)
Cost: about 20 seconds a run on two CPU cores.
Result: 99 % clean and 77 % under PGD-20, with and without AGR; 3 % for standard training
        (docs/results.md).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The paper's recipe, scaled down to digits."""
    config = base.recipe(profile)
    config.name = "digits_at"
    config.epochs = 40
    config.model.name = "wrn10_1"
    config.model.mean = (0.3,)
    config.model.std = (0.38,)
    config.data.name = "digits"
    config.data.validation_examples = 150
    config.data.crop_padding = 1
    config.data.flip = False  # a mirrored digit is no digit
    config.data.cutout = "none"
    config.attack.epsilon = 0.15
    config.attack.step_size = 0.0375
    config.agr.gop_start_epoch = 30 if profile == "official" else 0
    config.agr.gics_start_epoch = 30
    config.optimizer.milestones = (20, 30)
    config.eval.step_size = 0.0375
    return config
