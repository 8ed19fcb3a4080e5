"""Table 2: the models of Table 1 under L2 and L1 attacks.

Command: python launch.py --job=sweep --config=configs/paper/table2.py:small
"""

from ml_collections import ConfigDict

from configs.paper import plans


def get_config(scale: str = "full") -> ConfigDict:
    """The runs at a scale."""
    plans.check_scale(scale)
    sets = ("cifar10", "cifar100", "tinyimagenet") if scale == "full" else ("cifar10",)
    models = ("preactresnet18", "wrn34_10") if scale == "full" else ("preactresnet18",)
    return plans.plan(
        "table2",
        scale,
        [
            run
            for data in sets
            for model in models
            for method in plans.METHODS
            for run in plans.runs(
                scale,
                data=data,
                model=model,
                method=method,
                evaluations=[plans.table(2, scale)],
            )
        ],
        shows=("table2",),
    )
