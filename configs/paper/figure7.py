"""Figure 7: fixed shares tau of the adversarial gradient.

Command: python launch.py --job=sweep --config=configs/paper/figure7.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    taus = ("tau_0.0", "tau_0.25", "tau_0.5", "tau_0.75", "tau_0.9", "tau_1.0")
    return plans.plan(
        "figure7",
        scale,
        plans.runs(scale, arms=(*taus, "agr"), seeds_of=(0,)),
    )
