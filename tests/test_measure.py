"""Measurements against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np

from agr_jax import measure


def test_steps_to_the_boundary_of_a_linear_network():
    """A pixel each: the label changes where the pixel crosses 1/2."""
    images = jnp.array([0.5 + 3.5 / 255, 0.5 - 10.5 / 255, 0.9]).reshape(3, 1, 1, 1)
    logits_fn = jax.tree_util.Partial(
        lambda x: jnp.stack([x.reshape(len(x)), 1 - x.reshape(len(x))], 1)
    )
    found = set()
    for seed in range(8):
        steps = measure.steps_to_boundary(logits_fn, images, jax.random.key(seed), most=50)
        found.add(tuple(steps.tolist()))
    # Towards the boundary 4, 11, or more than 50 steps; away from it none changes it.
    assert {s[0] for s in found} == {4, 50}
    assert {s[1] for s in found} == {11, 50}
    assert {s[2] for s in found} == {50}


def test_filter_normalisation():
    scale = jnp.arange(1, 6.0)[None, None, None]
    params = {
        "conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 5)) * scale},
        "dense": {"kernel": jax.random.normal(jax.random.key(1), (7, 2)), "bias": jnp.ones(2)},
    }
    drawn = measure.gaussian_like(jax.random.key(2), params)
    found = measure.filter_normalised(drawn, params)
    for layer, axes in (("conv", (0, 1, 2)), ("dense", (0,))):
        ours, theirs, raw = (np.asarray(t[layer]["kernel"]) for t in (found, params, drawn))
        np.testing.assert_allclose(
            np.sqrt((ours**2).sum(axes)), np.sqrt((theirs**2).sum(axes)), rtol=1e-5
        )
        cosine = (ours * raw).sum(axes) / np.sqrt((ours**2).sum(axes) * (raw**2).sum(axes))
        np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    assert not found["dense"]["bias"].any()
