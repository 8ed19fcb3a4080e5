"""Runs of a sweep: what arms, scales and seeds change in a recipe, and which runs share a base."""

from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from agr_jax.errors import ConfigError
from configs import base as recipes

SCALES = ("full", "small", "digits")
SHORT = {"preactresnet18": "prn18"}
METHODS = ("at", "trades", "mart")
# Where the learning rate drops for the second time: AGR's interpolation and its controls begin.
BRANCH_EPOCH = {"full": 150, "small": 45, "digits": 4}
EPOCHS = {"full": 200, "small": 60, "digits": 6}


def plan(name: str, scale: str, runs: Iterable[ConfigDict], folder: str = "") -> ConfigDict:
    """A sweep: its runs in order, each once, in one folder that all sweeps of a scale share."""
    unique = {run.name: run for run in runs}
    return ConfigDict(
        {
            "sweep": name,
            "scale": check_scale(scale),
            "folder": folder or f"runs/paper-{scale}",
            "runs": tuple(unique.values()),
        }
    )


def check_scale(scale: str) -> str:
    """The scale, if there is such a one."""
    if scale not in SCALES:
        raise ConfigError(
            f"scale: must be one of {', '.join(SCALES)}, got {scale!r} (--config=FILE.py:SCALE)"
        )
    return scale


def seeds(scale: str) -> tuple[int, ...]:
    """Repetitions of every run; the paper has three."""
    return (0, 1, 2) if scale == "full" else (0, 1) if scale == "digits" else (0,)


def recipe(scale: str, data: str, model: str, method: str, seed: int) -> ConfigDict:
    """A method without AGR at a scale."""
    config = recipes.recipe("digits" if scale == "digits" else data, method, "paper")
    config.seed = seed
    config.epochs = EPOCHS[scale]
    config.agr.enabled = False
    config.agr.gics_start_epoch = BRANCH_EPOCH[scale]
    config.data.picture = False
    config.eval.attacks = ("clean", "pgd20")
    if scale == "full":
        config.model.name = model
        return config
    config.agr.gop_start_epoch = BRANCH_EPOCH[scale]
    if scale == "digits":
        config.data.train_examples = 512
        config.data.validation_examples = 0
        config.optimizer.milestones = (3, 4)
        config.attack.steps, config.attack.step_size = 3, 2.5 * config.attack.epsilon / 3
        config.eval.examples = 64
        return config
    config.model.name, config.model.width = model, 16
    config.data.train_examples, config.data.validation_examples = 10_000, 2_000
    config.attack.steps = 5
    config.optimizer.milestones = (30, 45)
    config.eval.every_epochs = 5
    return config


def arm(config: ConfigDict, name: str) -> ConfigDict:
    """A copy of a recipe with one way of combining the gradients switched on.

    Args:
        config: without AGR.
        name: `off`; `agr`; `clip` (AT + clip, the control); `agr_no_gop`; `agr_no_clip`; `mean`, or
            `tau_X`, instead of the cosine, clipped as AGR is.
    """
    config = config.copy_and_resolve_references()
    if name == "off":
        return config
    agr = config.agr
    agr.enabled = True
    if name == "clip":
        agr.gop, agr.interpolation, agr.clip = False, "none", "all"
        agr.clip_start_epoch = agr.gics_start_epoch
    elif name == "agr_no_gop":
        agr.gop = False
    elif name == "agr_no_clip":
        agr.clip = "none"
    elif name == "mean":
        agr.interpolation = "mean"
    elif name.startswith("tau_"):
        agr.interpolation, agr.tau = "fixed", float(name.removeprefix("tau_"))
    elif name != "agr":
        raise ConfigError(f"arm: there is none named {name!r}")
    return config


def whole_table(number: int, scale: str) -> ConfigDict:
    """The paper's Table 1 or 2: every data set, network and method, without and with AGR."""
    sets = ("cifar10", "cifar100", "tinyimagenet") if check_scale(scale) == "full" else ("cifar10",)
    models = ("preactresnet18", "wrn34_10") if scale == "full" else ("preactresnet18",)
    return plan(
        f"table{number}",
        scale,
        [
            run
            for data in sets
            for model in models
            for method in METHODS
            for run in runs(
                scale, data=data, model=model, method=method, evaluations=[table(number, scale)]
            )
        ],
    )


def runs(
    scale: str,
    *,
    data: str = "cifar10",
    model: str = "preactresnet18",
    method: str = "at",
    arms: Sequence[str] = ("off", "agr"),
    evaluations: Sequence[ConfigDict] = (),
    measurements: Sequence[str] = (),
    diagnostics: bool = False,
    from_start: bool = False,
    seeds_of: Sequence[int] | None = None,
) -> list[ConfigDict]:
    """The arms of one method, for every seed; below the full scale they branch from one base.

    At the full scale GOP acts from the first epoch, as the paper says, so there is no common base.
    Runs with diagnostics have names of their own: the clean gradient that they take costs time.
    """
    found = []
    mark = "-diagnosed" if diagnostics else ""
    for seed in seeds(scale) if seeds_of is None else seeds_of:
        common = recipe(scale, data, model, method, seed)
        prefix = f"{common.data.name}-{SHORT.get(common.model.name, common.model.name)}-{method}"
        init_from = ""
        if scale != "full" and not from_start:
            first = arm(common, "off")
            first.epochs = BRANCH_EPOCH[scale]
            first.name = init_from = f"{prefix}-base-seed{seed}"
            found.append(planned(init_from, first))
        for name in arms:
            config = arm(common, name)
            config.name = f"{prefix}-{name}{'-whole' if from_start else ''}{mark}-seed{seed}"
            config.diagnostics = diagnostics
            found.append(
                planned(
                    config.name,
                    config,
                    base=init_from,
                    evaluations=evaluations,
                    measurements=measurements,
                )
            )
    return found


def planned(
    name: str,
    config: ConfigDict,
    *,
    base: str = "",
    evaluations: Sequence[ConfigDict] = (),
    measurements: Sequence[str] = (),
) -> ConfigDict:
    """One run of a sweep: its config, the run that it branches from, and what follows training."""
    return ConfigDict(
        {
            "name": name,
            "config": config,
            "base": base,
            "evaluations": tuple(evaluations),
            "measurements": tuple(measurements),
        }
    )


def evaluation(label: str, attacks: Sequence[str], examples: int = 0) -> ConfigDict:
    """An evaluation beside the run's own; `examples` as `config.eval.examples`, 0 for all."""
    return ConfigDict({"label": label, "attacks": tuple(attacks), "examples": examples})


def table(number: int, scale: str) -> ConfigDict:
    """The columns of the paper's Table 1 or 2; fewer images below the full scale."""
    if scale == "digits":
        quick = {1: ("clean", "fgsm", "pgd20", "cw20", "fast"), 2: ("pgd20@l2", "pgd20-dense@l1")}
        return evaluation(f"table{number}", quick[number], 64)
    return evaluation(f"table{number}", (f"table{number}",), 0 if scale == "full" else 1000)
