"""The training step as a function of its number: which images it takes, and what it draws."""

import jax
import numpy as np
import pytest
from test_train import small

from agr_jax import sharding
from agr_jax.runs import Run
from agr_jax.training import Trainer

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The trainer of a run, a fresh state and the training images."""
    config = small(data__flip=True, data__crop_padding=1)
    run = Run.from_config(config, tmp_path_factory.mktemp("run"))
    trainer = Trainer.from_run(run)
    state = trainer.init(jax.random.key(0), run.dataset.image_shape)
    train = run.dataset.train
    return trainer, state, sharding.put((train.images, train.labels), sharding.replicated(run.mesh))


def at_step(state, number):
    return state.replace(step=state.step + number)


def test_a_step_takes_its_own_part_of_the_permutation(parts):
    trainer, state, (images, labels) = parts
    size, per_epoch = trainer.batch_size, trainer.steps_per_epoch
    permutation = np.random.default_rng(0).permutation(len(labels)).astype(np.int32)

    def in_epoch(state):
        return trainer.step(
            state, images, labels, permutation, KEY, clean_gradient=False, batch_size=size
        )

    def alone(state, rows):
        return trainer.step_on_batch(state, images[rows], labels[rows], KEY, clean_gradient=False)

    steps = [jax.jit(each) for each in (in_epoch, alone)]
    for number in (0, 1, per_epoch - 1, per_epoch + 2):
        first = number % per_epoch * size
        got = steps[0](at_step(state, number))
        expected = steps[1](at_step(state, number), permutation[first : first + size])
        for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_every_step_draws_anew(parts):
    trainer, state, (images, labels) = parts
    rows = np.arange(trainer.batch_size)
    inputs = jax.jit(lambda state: trainer.inputs(state, images[rows], labels[rows], KEY))
    first, again, second = (inputs(at_step(state, number)) for number in (0, 0, 1))
    np.testing.assert_array_equal(first.adversarial, again.adversarial)
    moved = [np.abs(first[i] - second[i]).reshape(len(rows), -1).max(1) > 0 for i in (0, 1)]
    assert moved[0].mean() > 0.5  # the augmentation
    assert moved[1].all()  # the attack's start
