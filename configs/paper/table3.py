"""Table 3: AGR without and with GOP, and how often GOP acts.

Command: python launch.py --job=sweep --config=configs/paper/table3.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    return plans.plan(
        "table3",
        scale,
        [
            run
            for method in plans.METHODS
            for run in plans.runs(
                scale, method=method, arms=("agr_no_gop", "agr"), diagnostics=True
            )
        ],
    )
