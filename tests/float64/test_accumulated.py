"""A batch in parts gives the gradients, and the steps, of the whole batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import agr_transform, sharding
from agr_jax.attacks import pgd
from agr_jax.data import Augmentation
from agr_jax.methods import (
    MART,
    TRADES,
    Accumulated,
    AdversarialTraining,
    AdversarialWeightPerturbation,
    AVmixup,
    StandardTraining,
    divergence_from,
)
from agr_jax.models.layers import BatchNorm
from agr_jax.threat import Linf
from agr_jax.training.step import Trainer

BATCH = 24
ATTACK = pgd(Linf(0.1), steps=4)
FROM_CLEAN = pgd(
    Linf(0.1),
    steps=4,
    loss=divergence_from,
    targets="clean_logits",
    random_start=False,
    start_noise=0.001,
)
METHODS = {
    "at": AdversarialTraining(ATTACK, label_smoothing=0.1),
    "trades": TRADES(FROM_CLEAN),
    "mart": MART(ATTACK),
    "standard": StandardTraining(),
}


class Network(nn.Module):
    normalised: bool = False

    @nn.compact
    def __call__(self, images, train=False):
        # Before BatchNorm a bias has no gradient, and a cosine of rounding errors.
        bias = not self.normalised
        x = nn.Conv(6, (3, 3), use_bias=bias, dtype=jnp.float64, param_dtype=jnp.float64)(images)
        if self.normalised:
            x = BatchNorm(dtype=jnp.float64, name="bn")(x, train=train)
        x = nn.softplus(x).reshape(len(x), -1)
        return nn.Dense(5, dtype=jnp.float64, param_dtype=jnp.float64)(x)


def trainer_of(method, devices, *, normalised=False):
    return Trainer(
        model=Network(normalised),
        method=method,
        optimizer=optax.chain(agr_transform(), optax.trace(0.9), optax.scale_by_learning_rate(0.1)),
        augmentation=Augmentation(crop_padding=1),
        batch_size=BATCH,
        steps_per_epoch=4,
        batch_stats="clean_then_adversarial",
        mesh=sharding.data_mesh(jax.devices()[:devices]),
        average_decay=0.9,
    )


def steps(method, devices=1, count=3, *, normalised=False):
    """State and metrics after some steps."""
    trainer = trainer_of(method, devices, normalised=normalised)
    state = trainer.init(jax.random.key(0), (6, 6, 2))
    state = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    generator, step = (
        np.random.default_rng(0),
        jax.jit(trainer.step_on_batch, static_argnames="clean_gradient"),
    )
    metrics = {}
    for _ in range(count):
        images = generator.integers(0, 256, (BATCH, 6, 6, 2), np.uint8)
        labels = generator.integers(0, 5, BATCH).astype(np.int32)
        batch = sharding.put((images, labels), sharding.batch_sharding(trainer.mesh))
        state, metrics = step(state, *batch, jax.random.key(1), clean_gradient=True)
    return jax.device_get((state, metrics))


def assert_same(got, expected, **tolerance):
    leaves = [jax.tree.leaves_with_path(tree) for tree in (got, expected)]
    for (path, left), (_, right) in zip(*leaves, strict=True):
        np.testing.assert_allclose(left, right, err_msg=jax.tree_util.keystr(path), **tolerance)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("trades", 2),
        *(
            pytest.param(name, parts, marks=pytest.mark.slow)
            for name in METHODS
            for parts in (2, 6)
            if (name, parts) != ("trades", 2)
        ),
    ],
)
def test_parts_give_the_steps_of_the_whole_batch(name, parts):
    method = METHODS[name]
    assert_same(steps(Accumulated(method, parts)), steps(method), rtol=1e-12, atol=1e-12)


def test_weights_are_perturbed_by_the_gradient_of_the_whole_batch():
    whole = AdversarialWeightPerturbation(METHODS["at"], gamma=0.05)
    parts = AdversarialWeightPerturbation(Accumulated(METHODS["at"], 4), gamma=0.05)
    assert_same(steps(parts), steps(whole), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_parts_are_the_same_on_several_devices():
    """With BatchNorm too, which normalises each part by itself."""
    method = Accumulated(METHODS["at"], 3)
    one, four = (steps(method, devices, normalised=True) for devices in (1, 4))
    assert_same(four, one, rtol=1e-9, atol=1e-9)
    other = steps(METHODS["at"], normalised=True)
    assert abs(one[1]["adversarial_loss"] - other[1]["adversarial_loss"]) > 1e-4


def test_batch_norm_sees_the_parts_in_turn():
    """Against a loop over the parts, by hand: the clean pass, then the adversarial one."""
    trainer = trainer_of(Accumulated(StandardTraining(), 2), 1, normalised=True)
    state = trainer.init(jax.random.key(0), (6, 6, 2))
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 6, 6, 2), np.uint8)
    labels = np.zeros(BATCH, np.int32)
    batch = trainer.inputs(state, jnp.asarray(images), jnp.asarray(labels), jax.random.key(1))
    statistics = state.batch_stats
    for _ in ("clean", "adversarial"):
        for part in (0, 1):
            _, statistics = trainer.forward(state.params, statistics, batch.images[part::2])
    after, _ = trainer.update(state, batch, clean_gradient=True)
    assert_same(after.batch_stats, statistics, rtol=1e-12)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="parts"):
        Accumulated(METHODS["at"], 0)
    with pytest.raises(ValueError, match="24 images cannot be split into 5 parts"):
        steps(Accumulated(METHODS["at"], 5), count=1)
    with pytest.raises(ValueError, match="gradient_points"):
        Accumulated(AdversarialWeightPerturbation(METHODS["at"]), 2)


@pytest.mark.slow
def test_avmixup_trains_in_parts():
    """Its mixing is drawn for each part anew, so it is no test of equality."""
    state, metrics = steps(Accumulated(AVmixup(ATTACK), 3))
    assert np.isfinite(metrics["adversarial_loss"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
