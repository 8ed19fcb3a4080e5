"""Table 4: the mean, a fixed share and the cosine (GICS) as the mix of the gradients.

Command: python launch.py --job=sweep --config=configs/paper/table4.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "table4",
        scale,
        [
            run
            for method in plans.METHODS
            for run in plans.runs(scale, method=method, arms=("mean", "tau_0.9", "agr"))
        ],
    )
