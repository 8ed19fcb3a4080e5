"""Figure 3: AWP and AVmixup without and with AGR, SPSA among the attacks.

Command: python launch.py --job=sweep --config=configs/paper/figure3.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    attacks = ("clean", "pgd20") if scale == "digits" else ("clean", "pgd20", "spsa")
    examples = 64 if scale == "digits" else 1000  # SPSA is costly
    return plans.plan(
        "figure3",
        scale,
        [
            run
            for method in ("awp", "avmixup")
            for run in plans.runs(
                scale,
                method=method,
                evaluations=[plans.evaluation("figure3", attacks, examples)],
                seeds_of=(0,),
            )
        ],
    )
