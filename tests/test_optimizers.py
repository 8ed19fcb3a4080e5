"""A run's optimiser against closed forms: the learning rate of every step, PyTorch's SGD."""

import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax.config import Config, from_config_dict
from agr_jax.errors import ConfigError
from agr_jax.training import optimizers
from configs import digits_at

STEPS_PER_EPOCH = 4


def small(**changes) -> Config:
    """Four epochs, drops of the rate after the second and the third."""
    values = digits_at.get_config()
    values.epochs = 4
    values.agr.enabled = False
    values.optimizer.milestones = (2, 3)
    values.optimizer.update(changes)
    return from_config_dict(values)


def rates(config: Config) -> list[float]:
    schedule = optimizers.schedule_from_config(config.optimizer, config.epochs, STEPS_PER_EPOCH)
    return [float(schedule(step)) for step in range(config.epochs * STEPS_PER_EPOCH)]


def test_the_rate_drops_with_the_first_step_of_an_epoch():
    expected = [0.1] * 8 + [0.01] * 4 + [0.001] * 4
    np.testing.assert_allclose(rates(small()), expected, rtol=1e-6)
    halved = [0.1] * 4 + [0.05] * 12
    np.testing.assert_allclose(rates(small(milestones=(1,), factor=0.5)), halved, rtol=1e-6)


def test_other_schedules():
    np.testing.assert_allclose(rates(small(schedule="constant")), [0.1] * 16, rtol=1e-6)
    steps = np.arange(16)
    expected = 0.05 * (1 + np.cos(np.pi * steps / 16))
    np.testing.assert_allclose(rates(small(schedule="cosine")), expected, rtol=1e-5, atol=1e-9)


def test_milestones_must_rise():
    with pytest.raises(ConfigError, match=r"config\.optimizer\.milestones: must rise, got \(3, 2"):
        rates(small(milestones=(3, 2)))


@pytest.mark.parametrize("clip_global_norm", [0.0, 0.5])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 5e-2), (0.9, 0.0), (0.0, 5e-2)])
def test_updates_are_those_of_pytorchs_sgd(nesterov, momentum, weight_decay, clip_global_norm):
    """Gradients are clipped, weight decay comes next, then momentum, and the rate at the end."""
    config = small(
        nesterov=nesterov,
        momentum=momentum,
        weight_decay=weight_decay,
        clip_global_norm=clip_global_norm,
    )
    optimizer = optimizers.from_config(config, STEPS_PER_EPOCH)
    generator = np.random.default_rng(0)
    weights = generator.normal(size=3)
    params = jnp.asarray(weights, jnp.float32)
    state = optimizer.init(params)
    buffer = np.zeros(3)
    for step, rate in enumerate(rates(config)[:10]):
        gradient = generator.normal(size=3)
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        if clip_global_norm:
            gradient *= min(1, clip_global_norm / np.linalg.norm(gradient))
        decayed = gradient + weight_decay * weights
        buffer = momentum * buffer + decayed
        moved = -rate * (decayed + momentum * buffer if nesterov else buffer)
        np.testing.assert_allclose(updates, moved, rtol=1e-4, atol=1e-7, err_msg=f"step {step}")
        weights, params = weights + moved, params + updates
