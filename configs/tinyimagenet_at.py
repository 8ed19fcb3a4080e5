"""Adversarial training with AGR on Tiny ImageNet, PreAct-ResNet-18, images resized to 32x32.

Source: the paper's section 5 ("32 x 32 random crops"; the published code resizes to 32).
Command: python launch.py --config=configs/tinyimagenet_at.py
         python launch.py --config=configs/tinyimagenet_at.py --config.agr.enabled=False
         python launch.py --config=configs/tinyimagenet_at.py --config.data.image_size=64
Profiles: paper (default), official (bug-compatible with the published code), best.
Cost: 29 GFLOP an image and AGR step (4 times that at 64 pixels), 100,000 images an epoch, 200
      epochs: 5.8e17 FLOP. Time on an accelerator: not measured (benchmarks/train_step.py measures
      a step).
Result: not measured at this scale (docs/results.md has what was run); the paper reports 6.48 under
        AutoAttack for AT with AGR at 32 pixels (its Table 1; not ours).
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The paper's recipe on Tiny ImageNet."""
    config = base.recipe(profile)
    config.name = "tinyimagenet_at"
    config.data.name = "tiny_imagenet"
    config.data.image_size = 32  # unstated in the paper; the published code
    return config
