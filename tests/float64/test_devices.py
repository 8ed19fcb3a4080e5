"""The same mathematics on one device or several: whole trajectories agree in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agr_jax import agr_transform, models, sharding
from agr_jax.attacks import pgd
from agr_jax.data import Augmentation
from agr_jax.methods import AdversarialTraining
from agr_jax.models.convolution import default_implementation
from agr_jax.threat import Linf
from agr_jax.training.step import Trainer

STEPS, BATCH = 10, 16


def trainer_on(devices):
    return Trainer(
        model=models.PreActResNet(
            10,
            blocks=(1, 1),
            width=8,
            conv=default_implementation(),
            dtype=jnp.float64,
            param_dtype=jnp.float64,
        ),
        method=AdversarialTraining(pgd(Linf(0.2), steps=10, step_size=0.05)),
        optimizer=optax.chain(
            agr_transform(),
            optax.add_decayed_weights(5e-4),
            optax.trace(0.9),
            optax.scale_by_learning_rate(0.1),
        ),
        augmentation=Augmentation(crop_padding=2, cutout_size=6),
        batch_size=BATCH,
        steps_per_epoch=4,
        batch_stats="clean_then_adversarial",
        mesh=sharding.data_mesh(jax.devices()[:devices]),
    )


@pytest.fixture(scope="module")
def initial():
    return trainer_on(1).init(jax.random.key(0, impl="rbg"), (16, 16, 3))


@pytest.fixture(scope="module")
def trained(initial):
    """`trained(devices, clean_gradient)`: state and metrics after every step; AT without one."""
    rng = np.random.default_rng(0)
    data = (
        rng.integers(0, 256, size=(4 * BATCH, 16, 16, 3), dtype=np.uint8),
        rng.integers(0, 10, size=4 * BATCH).astype(np.int32),
        rng.permutation(4 * BATCH).astype(np.int32),
        jax.random.key(7),
    )

    @functools.cache
    def run(devices, clean_gradient):
        trainer = trainer_on(devices)
        state, arguments = jax.device_put((initial, data), sharding.replicated(trainer.mesh))
        step = jax.jit(trainer.step, static_argnames=("clean_gradient", "batch_size"))
        history = []
        for _ in range(STEPS):
            state, metrics = step(
                state, *arguments, clean_gradient=clean_gradient, batch_size=BATCH
            )
            history.append(jax.device_get((state, metrics)))
        return history

    return run


def difference(tree, other):
    """Norm of the difference over the norm."""
    squares = [
        (np.sum((a - b) ** 2), np.sum(b**2))
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    ]
    apart, norm = np.sum(squares, axis=0) ** 0.5
    return apart / norm


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clean_gradient", "devices"),
    [
        pytest.param(True, 2, id="AGR-2"),
        pytest.param(True, 4, id="AGR-4", marks=pytest.mark.slow),
        pytest.param(False, 2, id="AT-2", marks=pytest.mark.slow),
        pytest.param(False, 4, id="AT-4", marks=pytest.mark.slow),
    ],
)
def test_ten_steps_agree(trained, devices, clean_gradient):
    alone, shared = trained(1, clean_gradient), trained(devices, clean_gradient)
    for (state, metrics), (other, other_metrics) in zip(alone, shared, strict=True):
        assert difference(other.params, state.params) <= 1e-9
        assert difference(other.batch_stats, state.batch_stats) <= 1e-9
        assert (
            difference(
                optax.tree.get(other.opt_state, "trace"), optax.tree.get(state.opt_state, "trace")
            )
            <= 1e-9
        )
        assert metrics.keys() == other_metrics.keys()
        for name, value in metrics.items():
            # The cosines and norms are kept in float32.
            np.testing.assert_allclose(other_metrics[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_the_run_exercises_what_it_compares(trained, initial):
    history = trained(1, True)
    last, _ = history[-1]
    assert int(last.step) == STEPS
    assert difference(last.params, initial.params) > 1e-3
    projected = np.stack([optax.tree.get(state.opt_state, "projected") for state, _ in history])
    assert 0 < projected.sum() < projected.size  # both branches of AGR
    assert all(m["adversarial_loss"] > 1.0001 * m["clean_loss"] for _, m in history)
    assert last.params["conv1"]["kernel"].dtype == jnp.float64


@pytest.mark.slow
def test_the_baseline_is_another_run(trained):
    last, _ = trained(1, True)[-1]
    baseline, _ = trained(1, False)[-1]
    assert difference(baseline.params, last.params) > 1e-3
