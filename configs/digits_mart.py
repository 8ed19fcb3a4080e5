"""MART with AGR on scikit-learn's digits: a smoke test.

1,797 images of 8x8 pixels, epsilon 0.15, no download: never evidence.
Source: the paper's recipe with a fifth of its epochs; Wang et al., ICLR 2020.
Command: python launch.py --config=configs/digits_mart.py
         python launch.py --config=configs/digits_mart.py --config.agr.enabled=False
         (the baseline)
Profiles: paper (default), official, best; docs/profiles.md compares them.
Cost: about half a minute on two CPU cores.
Result: docs/results.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The recipe in a profile."""
    return base.recipe("digits", "mart", profile)
