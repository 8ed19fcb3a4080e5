"""AWP (adversarial weight perturbation, on AT) with AGR on scikit-learn's digits: a smoke test.

1,797 images of 8x8 pixels, epsilon 0.15, no download: never evidence.
Source: the paper's recipe with a fifth of its epochs; Wu et al., NeurIPS 2020.
Command: python launch.py --config=configs/digits_awp.py
         python launch.py --config=configs/digits_awp.py --config.agr.enabled=False
         (the baseline). For AWP on TRADES: docs/profiles.md.
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: about half a minute on two CPU cores.
Result: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    return base.recipe("digits", "awp", profile)
