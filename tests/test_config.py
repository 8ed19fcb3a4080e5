"""Configs: every file loads in every profile and its step traces; every mistake is named."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import config as config_module
from agr_jax import sharding
from agr_jax.config import check_field_name, differences, from_config_dict, to_dict
from agr_jax.data import Dataset, Split
from agr_jax.errors import ConfigError
from agr_jax.runs import Run
from agr_jax.training import Trainer, optimizers
from configs.base import PROFILES

FILES = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[1] / "configs").glob("*.py")
    if path.stem not in ("__init__", "base", "from_run")
)
SHAPES = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "tiny_imagenet": ((32, 32, 3), 200),
}


def load(name: str, profile: str = "paper"):
    return importlib.import_module(f"configs.{name}").get_config(profile)


def stand_in(config: config_module.Config) -> Dataset:
    """A data set of the right shape whose images are never looked at."""
    shape, classes = SHAPES[config.data.name]
    rows = max(config.batch_size, classes) + 16
    split = Split(np.zeros([rows, *shape], np.uint8), np.arange(rows, dtype=np.int32) % classes)
    names = tuple(f"class {i}" for i in range(classes))
    return Dataset(config.data.name, names, split, split, None, "nowhere", True)


def test_every_data_set_has_every_method():
    data_sets = ("cifar10", "cifar100", "tinyimagenet", "digits")
    methods = ("at", "trades", "mart", "awp", "avmixup", "standard")
    recipes = {f"{data}_{method}" for data in data_sets for method in methods}
    assert set(FILES) == recipes | {"cifar10_at_l2"}


def trace_step(config: config_module.Config, *, clean_gradient: bool) -> dict:
    """Shapes of the metrics of a whole step, whose state must come out as it went in."""
    dataset = stand_in(config)
    trainer = Trainer.from_run(Run(config, Path(), dataset, sharding.data_mesh(jax.devices()[:1])))
    state = jax.eval_shape(lambda: trainer.init(jax.random.key(0), dataset.image_shape))
    rows = len(dataset.train.labels)
    next_state, metrics = jax.eval_shape(
        lambda s: trainer.step(
            s,
            jnp.zeros([rows, *dataset.image_shape], jnp.uint8),
            jnp.zeros([rows], jnp.int32),
            jnp.arange(rows),
            jax.random.key(0),
            clean_gradient=clean_gradient,
            batch_size=config.batch_size,
        ),
        state,
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), next_state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["adversarial_loss"].shape == ()
    if clean_gradient:
        assert metrics["leaf_cosine"].shape == (len(jax.tree.leaves(state.params)),)
    return metrics


@pytest.mark.parametrize(
    "profile",
    [
        "paper",
        *(pytest.param(name, marks=pytest.mark.slow) for name in PROFILES if name != "paper"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_every_config_is_valid_and_its_step_traces(name, profile):
    config = from_config_dict(load(name, profile).lock())
    assert config.profile == profile
    assert config.name == name
    # What an epoch needs that comes late in the run: the most that this config does.
    late = config.epochs - 1
    clean_gradient = optimizers.uses_clean_gradient(config.agr, late)
    assert clean_gradient == config.agr.enabled
    # The other data sets differ in the number of classes alone; each method is traced on digits.
    if config.data.name == "digits" or name == "cifar10_at":
        metrics = trace_step(config, clean_gradient=clean_gradient)
        assert ("cosine" in metrics) == clean_gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar100_at", "tinyimagenet_at"])
def test_other_numbers_of_classes_trace_too(name):
    assert "cosine" in trace_step(from_config_dict(load(name)), clean_gradient=True)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "cifar10_at" else pytest.param(name, marks=pytest.mark.slow)
        for name in FILES
        if name.startswith("cifar10_")
    ],
)
def test_the_other_network_and_the_baseline_trace_too(name):
    values = load(name)
    values.model.name = "wrn10_2" if name == "cifar10_at" else "wrn10_2_silu"
    assert "cosine" not in trace_step(from_config_dict(values), clean_gradient=False)


@pytest.mark.slow
def test_the_papers_larger_network_traces():
    values = load("cifar10_awp")
    values.model.name = "wrn34_10"
    metrics = trace_step(from_config_dict(values), clean_gradient=True)
    assert metrics["leaf_cosine"].shape == (98,)


@pytest.mark.parametrize("name", FILES)
def test_docstring_says_source_command_cost_and_result(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"--config=configs/{name}.py" in text
    assert "Cost" in text
    assert "Result" in text


def test_profiles_are_the_papers_and_the_published_codes():
    paper, official = (from_config_dict(load("cifar10_at", p)) for p in ("paper", "official"))
    assert (paper.epochs, paper.batch_size, paper.optimizer.milestones) == (200, 128, (100, 150))
    assert (paper.agr.gop_start_epoch, paper.agr.gics_start_epoch) == (0, 150)
    assert paper.agr.clip == "interpolated"
    assert (official.agr.gop_start_epoch, official.agr.gics_start_epoch) == (155, 155)
    assert official.agr.clip == "changed"
    assert not official.attack.box_every_step
    assert official.data.cutout == "official"
    for config in (paper, official):
        assert config.attack.epsilon == 8 / 255
        assert config.attack.step_size == 2 / 255
        assert config.optimizer.weight_decay == 5e-4


def test_round_trip_through_json():
    config = from_config_dict(load("cifar10_at"))
    assert from_config_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("epochs", 0, r"config\.epochs: must be at least 1, got 0"),
        ("epochs", "ten", r"config\.epochs: must be int, got str 'ten'"),
        ("epochs", True, r"config\.epochs: must be int, got bool True"),
        ("profile", "papper", r"config\.profile: must be one of .*did you mean 'paper'"),
        ("agr.clip_norm", 0.0, r"config\.agr\.clip_norm: must be above 0"),
        ("attack.epsilon", float("inf"), r"config\.attack\.epsilon: must be at least 0, got inf"),
        ("agr.tau", 1.5, r"config\.agr\.tau: must be at least 0 and at most 1, got 1\.5"),
        (
            "attack.norm",
            "l3",
            r"config\.attack\.norm: must be one of linf, l2, l1, or .*, got 'l3'",
        ),
        ("model.std", (0.2, 0.0), r"config\.model\.std\[1\]: must be above 0"),
        ("optimizer.milestones", 3, r"config\.optimizer\.milestones: must be a tuple"),
        ("method", "trads", r"config\.method: must be one of at, trades.*did you mean 'trades'"),
        ("method", "no function:", r"config\.method: must be one of .* MODULE:FUNCTION"),
        ("averaging.decay", 1.0, r"config\.averaging\.decay: must be at least 0 and at most"),
        ("awp.clean_gradient_at", "w", r"config\.awp\.clean_gradient_at: must be one of unpert"),
        ("data", 3, r"config\.data: must be a group of fields"),
    ],
)
def test_wrong_values_are_named(field, value, message):
    values = to_dict(from_config_dict(load("digits_at")))
    group = values
    *groups, last = field.split(".")
    for name in groups:
        group = group[name]
    group[last] = value
    with pytest.raises(ConfigError, match=message):
        from_config_dict(values)


def test_unknown_and_missing_fields_are_named():
    values = to_dict(from_config_dict(load("digits_at")))
    values["agr"]["gop_strat_epoch"] = 3
    with pytest.raises(ConfigError, match=r"config\.agr\.gop_strat_epoch.*did you mean 'gop_start"):
        from_config_dict(values)
    del values["agr"]["gop_strat_epoch"], values["model"]["name"]
    with pytest.raises(ConfigError, match=r"config\.model\.name: the field is missing"):
        from_config_dict(values)
    with pytest.raises(ConfigError, match=r"config\.agr\.clipp.*did you mean 'clip'"):
        check_field_name("config.agr.clipp")
    check_field_name("config.agr.clip")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"gop": False, "interpolation": "none", "clip": "all"},
            r"config\.agr\.clip_start_epoch: .*got -1",
        ),
        (
            {"interpolate_negative": True},
            r"config\.agr\.interpolate_negative: .*=mean or fixed, got cosine",
        ),
    ],
)
def test_agr_fields_that_contradict_each_other(fields, message):
    values = load("digits_at")
    values.agr.update(fields)
    config = from_config_dict(values)
    with pytest.raises(ConfigError, match=message):
        Trainer.from_run(
            Run(config, Path(), stand_in(config), sharding.data_mesh(jax.devices()[:1]))
        )


def test_a_batch_that_the_devices_cannot_share():
    config = dataclasses.replace(from_config_dict(load("digits_at")), batch_size=30)
    with pytest.raises(ConfigError, match=r"config\.batch_size: 30 images .* by 4 devices"):
        Trainer.from_run(
            Run(config, Path(), stand_in(config), sharding.data_mesh(jax.devices()[:4]))
        )


def test_differences_name_the_fields():
    left = to_dict(from_config_dict(load("digits_at")))
    right = json.loads(json.dumps(left))
    right["agr"]["tau"] = 0.5
    assert differences(left, right) == {"config.agr.tau": (0.9, 0.5)}
