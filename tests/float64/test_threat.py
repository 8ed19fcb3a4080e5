"""Projections and unit steps in float64 against every stored array."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax.threat import L1, L2, Linf


@pytest.fixture(scope="module")
def z(golden):
    return golden("projections.npz")


def check(z, got, key):
    expected = z[f"{key}_ref64"]
    assert got.dtype == jnp.float64
    # golden/README.md: the reference is stored in float32.
    atol = 1e-10 * np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=atol, err_msg=key)


def wide(z, key):
    return jnp.asarray(z[key], jnp.float64)


def test_balls(z):
    x, v = wide(z, "ball_x"), wide(z, "ball_v")
    check(z, Linf(0.1).project(x + v, x), "ball_pgd_linf")
    check(z, L2(0.5).project(x + v, x), "ball_apgd_l2")
    check(z, L2(0.5).project(v, jnp.zeros_like(v), box=False), "ball_l2ball_noclip")


def test_unit_steps(z):
    v = wide(z, "ball_v")
    check(z, L2(0.5).ascent(v), "ball_normalize_l2")
    check(z, L1(0.5, sparsity=None).ascent(v), "ball_normalize_l1")


@pytest.mark.parametrize("epsilon", ["0p1", "1", "12"])
@pytest.mark.parametrize("scale", ["small", "mid", "big"])
@pytest.mark.parametrize("size", [7, 192, 3072])
def test_l1_projection(z, size, scale, epsilon):
    key = f"l1ball_d{size}_{scale}_e{epsilon}"
    x, y = wide(z, f"{key}_x"), wide(z, f"{key}_y")
    got = jax.jit(L1(float(z[f"{key}_eps"])).project)(x + y, x) - x
    expected = z[f"{key}_projected_ref64"]
    assert got.dtype == jnp.float64
    atol = 1e-10 * np.abs(expected).max()
    # x + u - x is u up to a few roundings of numbers below 16.
    np.testing.assert_allclose(got, expected, rtol=1e-7, atol=max(atol, 1e-14))


def test_l1_projection_is_the_nearest_point():
    # The optimality condition of a Euclidean projection p of c on a convex set: no point q of the
    # set has <c - p, q - p> > 0.
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(4, 3, 4, 2)))
    candidates = images + jnp.asarray(rng.normal(size=images.shape))
    threat = L1(1.5)
    nearest = threat.project(candidates, images)
    np.testing.assert_allclose(threat.distance(nearest, images), 1.5, rtol=1e-12)
    for seed in range(20):
        inside = threat.random_start(jax.random.key(seed), images)
        product = ((candidates - nearest) * (inside - nearest)).sum((1, 2, 3))
        assert (product <= 1e-12).all()


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)])
def test_projection_is_idempotent(threat):
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.uniform(size=(4, 5, 4, 3)))
    once = threat.project(images + jnp.asarray(rng.normal(size=images.shape)), images)
    np.testing.assert_allclose(threat.project(once, images), once, rtol=0, atol=1e-15)
    assert (threat.distance(once, images) <= threat.epsilon * (1 + 1e-14)).all()
