"""The paper's recipe, and what data sets, methods and profiles change in it.

Every config file is `recipe(data, method, profile)` and what it sets beyond that. Values marked
"unstated in the paper" are followed by where ours comes from; `docs/profiles.md` compares the
profiles field by field.
"""

from ml_collections import ConfigDict

from agr_jax.errors import ConfigError

PROFILES = ("paper", "official", "best")


def recipe(data: str, method: str, profile: str) -> ConfigDict:
    """A config by data set, method and profile.

    Args:
        data: `cifar10`, `cifar100`, `tinyimagenet` or `digits`.
        method: `at`, `trades`, `mart`, `awp`, `avmixup` or `standard`.
        profile: `paper`, `official` or `best`.

    Raises:
        ConfigError: on another profile, which a user gives on the command line.
    """
    if profile not in PROFILES:
        raise ConfigError(
            f"profile: must be one of {', '.join(PROFILES)}, got {profile!r} "
            "(--config=FILE.py:PROFILE)"
        )
    config = _paper()
    config.name = f"{data}_{method}"
    config.profile = profile
    if profile == "official":
        _set_official(config)
    if profile == "best":
        _set_best(config)
    _METHODS[method](config)
    _DATA[data](config)
    return config


def _paper() -> ConfigDict:
    """Adversarial training with AGR on CIFAR-10."""
    return ConfigDict(
        {
            "name": "",
            "profile": "paper",
            "method": "at",
            "seed": 0,
            "epochs": 200,
            "batch_size": 128,  # unstated in the paper; the published code
            "accumulate": 1,
            "label_smoothing": 0.0,
            # The published code's order of BatchNorm updates, in its baseline too.
            "batch_stats": "clean_then_adversarial",
            "diagnostics": False,
            "init_from": "",
            "deterministic": False,
            "model": {
                "name": "preactresnet18",
                "width": 0,
                # ImageNet's; unstated in the paper; the published code, for every data set
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
                "conv": "auto",
            },
            "data": {
                "name": "cifar10",
                "dir": "",
                "image_size": 0,
                "subset_ok": False,
                "train_examples": 0,
                "validation_examples": 0,  # the paper evaluates its last checkpoint
                "last_batch": "drop",  # unstated in the paper
                "crop_padding": 4,
                "flip": True,
                "cutout": "devries",  # unstated in the paper; the technique that it cites
                "cutout_size": 16,  # unstated in the paper; DeVries and Taylor
                "resize": "crop",
                "download": True,
                "cache": True,
                "extra": "",
                "extra_fraction": 0.0,
                "device_budget_mb": 0,
                "picture": True,
            },
            "attack": {
                "norm": "linf",
                "epsilon": 8 / 255,
                "step_size": 2 / 255,
                "steps": 10,
                "objective": "cross_entropy",
                "random_start": True,
                "start_noise": 0.0,
                "box_every_step": True,
            },
            "trades": {"beta": 6.0},  # the paper's 1 / lambda
            "mart": {"beta": 6.0},  # unstated in the paper; the published code
            # Lee et al. 2020 and its published code, CIFAR-10
            "avmixup": {
                "gamma": 2.0,
                "clean_label": 1.0,
                "vertex_label": 0.1,
                "hard_labels": False,
            },
            "awp": {
                "enabled": False,
                "gamma": 0.01,  # unstated in the paper; the published code, and AWP's own for AT
                "start_epoch": 0,
                "clean_gradient_at": "unperturbed",  # unstated in the paper
            },
            "averaging": {"decay": 0.0},
            "agr": {
                "enabled": True,
                "gop": True,
                "gop_start_epoch": 0,
                "interpolation": "cosine",
                "tau": 0.9,
                "gics_start_epoch": 150,
                "interpolate_negative": False,
                "clip": "interpolated",
                "clip_norm": 0.1,  # unstated in the paper; the published code
                "clip_start_epoch": -1,
                "granularity": "leaf",
            },
            "optimizer": {
                "learning_rate": 0.1,
                "momentum": 0.9,
                "nesterov": False,
                "weight_decay": 5e-4,
                "clip_global_norm": 0.0,
                "schedule": "piecewise",
                "milestones": (100, 150),
                "factor": 0.1,
            },
            "checkpoints": {"every_epochs": 1, "keep_epochs": ()},
            "eval": {
                "attacks": ("clean", "fgsm", "pgd20"),
                "checkpoints": ("last", "best", "average"),
                "examples": 0,
                "batch_size": 500,
                "step_size": 2 / 255,  # unstated in the paper; the published code
                "l2_epsilon": 128 / 255,
                "l1_epsilon": 2000 / 255,
                "every_epochs": 1,
            },
            "precision": {"train": "float32"},
            "measure": {
                "names": ("boundary", "landscape"),
                "images": 100,
                "directions": 10,  # 1,000 in all, as in the paper's Figure 4
                "most_steps": 255,
                "points": 21,
                "batches": 200,
            },
        }
    )


def _set_official(config: ConfigDict) -> None:
    """The published code, quirks included."""
    config.batch_stats = "published"
    config.agr.gop_start_epoch = 155
    config.agr.gics_start_epoch = 155
    config.agr.clip = "changed"
    config.attack.box_every_step = False
    config.data.cutout = "official"
    config.data.last_batch = "keep"


def _set_best(config: ConfigDict) -> None:
    """What the field has found since, without extra data. Sources: `docs/profiles.md`."""
    config.data.validation_examples = 1000
    config.averaging.decay = 0.999
    config.label_smoothing = 0.1


def _at(config: ConfigDict) -> None:
    config.method = "at"


def _trades(config: ConfigDict) -> None:
    config.method = "trades"
    if config.profile != "official":  # whose TRADES attacks the cross-entropy
        config.attack.objective = "kl"
        _start_near_the_image(config)


def _mart(config: ConfigDict) -> None:
    config.method = "mart"
    if config.profile != "official":  # whose MART starts anywhere in the ball
        _start_near_the_image(config)
    config.label_smoothing = 0.0  # MART's loss has no smoothed form in its paper


def _awp(config: ConfigDict) -> None:
    config.method = "at"
    config.awp.enabled = True


def _avmixup(config: ConfigDict) -> None:
    config.method = "avmixup"
    config.label_smoothing = 0.0  # its labels are soft already
    if config.profile == "official":
        config.avmixup.clean_label = 0.5
        config.avmixup.vertex_label = 0.7
        config.avmixup.hard_labels = True


def _standard(config: ConfigDict) -> None:
    config.method = "standard"
    config.agr.enabled = False  # both gradients are the same
    config.batch_stats = "adversarial"  # the one pass, once


def _start_near_the_image(config: ConfigDict) -> None:
    config.attack.random_start = False
    config.attack.start_noise = 0.001  # the published codes of TRADES and of MART


def _cifar10(config: ConfigDict) -> None:
    config.data.name = "cifar10"


def _cifar100(config: ConfigDict) -> None:
    config.data.name = "cifar100"


def _tinyimagenet(config: ConfigDict) -> None:
    config.data.name = "tiny_imagenet"
    config.data.image_size = 32  # unstated in the paper; the published code


def _digits(config: ConfigDict) -> None:
    """A fifth of the epochs, and epsilon as large as 8x8 images need."""
    config.data.name = "digits"
    config.epochs = 40
    config.model.name = "wrn10_1"
    config.model.mean = (0.3,)
    config.model.std = (0.38,)
    config.data.validation_examples = 150
    config.data.crop_padding = 1
    config.data.flip = False  # a mirrored digit is no digit
    config.data.cutout = "none"
    config.attack.epsilon = 0.15
    config.attack.step_size = 0.0375
    config.agr.gop_start_epoch = 30 if config.profile == "official" else 0
    config.agr.gics_start_epoch = 30
    config.optimizer.milestones = (20, 30)
    config.eval.step_size = 0.0375
    if config.averaging.decay:
        config.averaging.decay = 0.99  # 400 steps in all


_METHODS = {
    "at": _at,
    "trades": _trades,
    "mart": _mart,
    "awp": _awp,
    "avmixup": _avmixup,
    "standard": _standard,
}
_DATA = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "tinyimagenet": _tinyimagenet,
    "digits": _digits,
}
