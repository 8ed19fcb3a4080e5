"""Figure 5: the loss along random directions of the weights.

Command: python launch.py --job=sweep --config=configs/paper/figure5.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "figure5",
        scale,
        plans.runs(scale, measurements=["landscape"], seeds_of=(0,)),
    )
