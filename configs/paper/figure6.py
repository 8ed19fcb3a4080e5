"""Figure 6: clean and adversarial loss by epoch.

Command: python launch.py --job=sweep --config=configs/paper/figure6.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan("figure6", scale, plans.runs(scale, seeds_of=(0,)))
