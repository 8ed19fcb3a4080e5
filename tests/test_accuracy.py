"""Which images count as robust: each image's draws are its own, whatever the batches are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax import sharding
from agr_jax.data import Split
from agr_jax.evaluation import correct_under_attack


@dataclasses.dataclass(frozen=True)
class Coin:
    """Paints an image white or black, as its key says."""

    def __call__(self, logits_fn, images, labels, keys):
        heads = jax.vmap(jax.random.bernoulli)(keys)
        return jnp.broadcast_to(heads[:, None, None, None], images.shape).astype(images.dtype)


@jax.tree_util.register_static
class Brightness:
    """Class 1 is white."""

    def __call__(self, images):
        mean = images.mean((1, 2, 3))
        return jnp.stack([1 - mean, mean], 1)


def verdicts(batch_size, devices=1, seed=0):
    split = Split(np.zeros([101, 2, 2, 1], np.uint8), np.ones(101, np.int32))
    mesh = sharding.data_mesh(jax.devices()[:devices])
    return correct_under_attack(
        Brightness(), Coin(), split, seed=seed, batch_size=batch_size, mesh=mesh
    )


def test_each_image_has_draws_of_its_own():
    found = verdicts(101)
    assert 30 < found.sum() < 71
    assert (found != verdicts(101, seed=1)).sum() > 20


@pytest.mark.parametrize(("batch_size", "devices"), [(7, 1), (50, 4), (1000, 2)])
def test_neither_batches_nor_devices_matter(batch_size, devices):
    np.testing.assert_array_equal(verdicts(batch_size, devices), verdicts(101))
