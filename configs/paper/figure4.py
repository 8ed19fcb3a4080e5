"""Figure 4: distances to the decision boundary along random directions.

Command: python launch.py --job=sweep --config=configs/paper/figure4.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "figure4",
        scale,
        plans.runs(scale, measurements=["boundary"], seeds_of=(0,)),
    )
