"""The network that a config names: by name, or a function of one's own."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import pytest

from agr_jax import models
from agr_jax.config import from_config_dict
from agr_jax.errors import ConfigError
from configs import base


class Linear(nn.Module):
    classes: int
    table: object = None

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.classes)(images.reshape(len(images), -1))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        self.variable("calls", "count", jnp.zeros, ())
        return nn.Dense(10)(images.reshape(len(images), -1))


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return images.reshape(len(images), -1)[:, :10]


class Untold(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1))


class Random(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(images.reshape(len(images), -1))
        return nn.Dense(10)(x)


def linear(config, num_classes, dtype):
    return Linear(num_classes)


def unequal(config, num_classes, dtype):
    return Linear(num_classes, table=object())


def unhashable(config, num_classes, dtype):
    return Linear(num_classes, table=[1])


def text(config, num_classes, dtype):
    return "a network"


def config_of(name):
    values = base.recipe("digits", "at", "paper")
    values.model.name = name
    return from_config_dict(values)


def own(function):
    return models.from_config(config_of(f"{__name__}:{function}"), 10)


def test_by_name():
    made = models.from_config(config_of("wrn10_1"), 10, jnp.bfloat16)
    assert isinstance(made, models.WideResNet)
    assert (made.num_classes, made.dtype, made.mean) == (10, jnp.bfloat16, (0.3,))


def test_of_your_own():
    assert own("linear") == Linear(10)
    models.check_trainable(own("linear"), 10, (8, 8, 1))


def test_made_once():
    """Two that are not equal would each be compiled."""
    assert unequal(None, 10, None) != unequal(None, 10, None)
    assert own("unequal") is own("unequal")
    other = dataclasses.replace(config_of(f"{__name__}:unequal"), seed=1)
    assert models.from_config(other, 10) is not own("unequal")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"unknown model 'resnet18': choose 'preactresnet18' or .* MODULE:FUNCTION"),
        ("no_such_module:create", "cannot import 'no_such_module:create': No module named"),
        (f"{__name__}:other", "cannot import .* has no attribute 'other'"),
        (":create", "cannot import ':create'"),
        (".nets:create", "cannot import"),
        ("json:decoder", "json:decoder is no function, but a module"),
        (f"{__name__}:text", r"must return a flax\.linen\.Module, got str"),
        (f"{__name__}:unhashable", "returns cannot be hashed .*table = .1. .*: it is a"),
    ],
)
def test_what_is_no_network_is_refused(name, message):
    with pytest.raises(ConfigError, match=rf"config\.model\.name: .*{message}"):
        models.from_config(config_of(name), 10)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Linear(9), r"to logits \[batch, 10\], got .*\(2, 9\).* for a batch of 2"),
        (Counting(), "'params' and at most 'batch_stats' beside them, got 'calls', 'params'"),
        (Nothing(), "got no variables"),
        (Untold(), r"called as model\.apply\(variables, images, train=.*unexpected keyword"),
        (Random(), "without random numbers: .*dropout"),
    ],
)
def test_what_cannot_be_trained_is_refused(model, message):
    with pytest.raises(ConfigError, match=rf"config\.model\.name: .*{message}"):
        models.check_trainable(model, 10, (8, 8, 1))


def test_standard_deviations_of_other_pixels_are_refused():
    values = base.recipe("digits", "at", "paper")
    values.model.std = (63.0, 62.1, 66.7)
    with pytest.raises(ConfigError, match=r"^config\.model\.std must be above 0 .* divide by 255"):
        models.from_config(from_config_dict(values), 10)
