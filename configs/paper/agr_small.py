"""AGR-small: the experiment of `docs/experiments.md`, which says what would count before the runs.

Command: python launch.py --job=sweep --config=configs/paper/agr_small.py
Cost: three bases of 45 epochs, 20 branches of 15 and one run of 60, and their evaluations: on two
CPU cores about ten hours, by estimate.
"""

from ml_collections import ConfigDict

from configs.paper import plans

ON_EVERY_BASE = ("off", "clip", "agr", "agr_no_clip", "tau_0.9")
# The mean of both gradients is tau 0.5.
ON_THE_FIRST = ("tau_0.75", "tau_0.5", "tau_0.25", "tau_0.0", "agr_no_gop")
# The names of `docs/experiments.md`.
NAMES = {"off": "at", "clip": "at_clip"}


def get_config(scale: str = "small") -> ConfigDict:
    """The runs, `small` as written there, or `digits` to try it out."""
    plans.check_scale(scale)
    examples = 64 if scale == "digits" else 1000
    fast = plans.evaluation("fast", ("fast",), examples)
    runs = []
    for seed in (0, 1) if scale == "digits" else (0, 1, 2):
        common = plans.recipe(scale, "cifar10", "preactresnet18", "at", seed)
        common.agr.clip_start_epoch = plans.BRANCH_EPOCH[scale]
        common.eval.checkpoints = ("last",)
        base = plans.arm(common, "off")
        base.epochs = plans.BRANCH_EPOCH[scale]
        base_name = f"base-{seed}"
        runs.append(plans.planned(base_name, base, measurements=["mechanism"]))
        for name in (*ON_EVERY_BASE, *(ON_THE_FIRST if seed == 0 else ())):
            config = plans.arm(common, name)
            title = f"{NAMES.get(name, name)}-{seed}"
            runs.append(plans.planned(title, config, base=base_name, evaluations=[fast]))
    best = plans.recipe(scale, "cifar10", "preactresnet18", "at", 0)
    best.profile = "best"
    best.optimizer.schedule = "cosine"
    best.label_smoothing = 0.1
    best.averaging.decay = 0.995
    best.eval.checkpoints = ("last", "average")
    runs.append(plans.planned("best-0", best, evaluations=[fast]))
    return plans.plan("agr_small", scale, runs, folder=f"runs/agr-{scale}")
