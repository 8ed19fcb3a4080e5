"""Figure 8: seconds an epoch and peak memory of AT, TRADES, MART and AGR.

Command: python launch.py --job=sweep --config=configs/paper/figure8.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "figure8",
        scale,
        [
            *plans.runs(scale, arms=("off", "agr"), seeds_of=(0,)),
            *plans.runs(scale, method="trades", arms=("off",), seeds_of=(0,)),
            *plans.runs(scale, method="mart", arms=("off",), seeds_of=(0,)),
        ],
    )
