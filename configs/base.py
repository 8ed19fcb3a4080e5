"""The paper's recipe, and what the profiles `official` and `best` change in it.

Every config file starts from `recipe(profile)` and sets only what differs. Values marked "unstated
in the paper" are followed by where ours comes from.
"""

from ml_collections import ConfigDict

from agr_jax.errors import ConfigError

PROFILES = ("paper", "official", "best")


def recipe(profile: str) -> ConfigDict:
    """Adversarial training with AGR on 32x32 colour images."""
    if profile not in PROFILES:
        raise ConfigError(
            f"profile: must be one of {', '.join(PROFILES)}, got {profile!r} "
            "(--config=FILE.py:PROFILE)"
        )
    config = ConfigDict(
        {
            "name": "",
            "profile": profile,
            "method": "at",
            "seed": 0,
            "epochs": 200,
            "batch_size": 128,  # unstated in the paper; the published code
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
            },
            "attack": {
                "norm": "linf",
                "epsilon": 8 / 255,
                "step_size": 2 / 255,
                "steps": 10,
                "random_start": True,
                "box_every_step": True,
            },
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
                "schedule": "piecewise",
                "milestones": (100, 150),
                "factor": 0.1,
            },
            "checkpoints": {"every_epochs": 1, "keep_epochs": ()},
            "eval": {
                "attacks": ("clean", "fgsm", "pgd20"),
                "examples": 0,
                "batch_size": 500,
                "step_size": 2 / 255,  # unstated in the paper; the published code
                "every_epochs": 1,
            },
            "precision": {"train": "float32"},
        }
    )
    if profile == "official":
        config.agr.gop_start_epoch = 155
        config.agr.gics_start_epoch = 155
        config.agr.clip = "changed"
        config.attack.box_every_step = False
        config.data.last_batch = "keep"
        config.data.cutout = "official"
    if profile == "best":
        config.data.validation_examples = 1000
    return config
