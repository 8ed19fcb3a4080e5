"""Figure 1: the cosine of the two gradients by layer over the iterations of AT.

Command: python launch.py --job=sweep --config=configs/paper/figure1.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "figure1",
        scale,
        plans.runs(scale, arms=("off",), diagnostics=True, from_start=True, seeds_of=(0,)),
    )
