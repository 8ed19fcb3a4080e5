"""Steps to a hyperplane inside the box against SciPy's solvers and the optimality conditions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from agr_jax.attacks._hyperplane import step_to_hyperplane
from agr_jax.threat import L1, L2, Linf

RNG = np.random.default_rng(0)
PIXELS = 12


def problems(count=40):
    """Points with pixels on the border, weights with zeros and ties, excesses of both signs."""
    points = np.clip(RNG.uniform(-0.3, 1.3, (count, PIXELS)), 0, 1)
    weights = RNG.normal(size=(count, PIXELS)) * (RNG.random((count, PIXELS)) > 0.2)
    weights[:10] = np.sign(weights[:10])
    reach = np.where(weights > 0, points, 1 - points) * np.abs(weights)
    excess = reach.sum(1) * RNG.uniform(0.05, 0.95, count)
    # A hyperplane on the other side is reached against the weights.
    other = (np.where(weights > 0, 1 - points, points) * np.abs(weights)).sum(1)
    flipped = np.arange(count) % 2 == 1
    excess = np.where(flipped, -other * RNG.uniform(0.05, 0.95, count), excess)
    return points, weights, excess


def steps(threat, points, weights, excess):
    arrays = (jnp.asarray(a, jnp.float32) for a in (points, weights, excess))
    return np.asarray(step_to_hyperplane(threat, *arrays), np.float64)


@pytest.mark.parametrize("threat", [Linf(0.0), L2(0.0), L1(0.0)], ids=["Linf", "L2", "L1"])
def test_lands_on_the_hyperplane_in_the_box(threat):
    points, weights, excess = problems()
    step = steps(threat, points, weights, excess)
    np.testing.assert_allclose((step * weights).sum(1), -excess, atol=2e-6)
    assert (points + step >= -1e-7).all()
    assert (points + step <= 1 + 1e-7).all()


def test_linf_and_l1_are_optimal_as_linear_programs():
    points, weights, excess = problems()
    for threat, norm in (
        (Linf(0.0), lambda d: np.abs(d).max()),
        (L1(0.0), lambda d: np.abs(d).sum()),
    ):
        step = steps(threat, points, weights, excess)
        for point, weight, needed, got in zip(points, weights, excess, step, strict=True):
            best = smallest_norm(point, weight, needed, linf=isinstance(threat, Linf))
            assert norm(got) <= best + 2e-6


def smallest_norm(point, weight, needed, *, linf):
    """Over d = up - down, with a bound t on every |d| (Linf), or their sum (L1)."""
    n = len(point)
    bounds = [(0, 1 - p) for p in point] + [(0, p) for p in point] + [(0, None)] * linf
    cost = [0] * (2 * n) + [1] if linf else [1] * (2 * n)
    equal = [*weight, *-weight] + [0] * linf
    limits = None
    if linf:
        limits = np.hstack([np.eye(n), np.eye(n), -np.ones((n, 1))])
    result = linprog(
        cost,
        A_eq=[equal],
        b_eq=[-needed],
        A_ub=limits,
        b_ub=None if limits is None else np.zeros(n),
        bounds=bounds,
    )
    assert result.status == 0
    return result.fun


def test_l2_meets_the_conditions_of_kuhn_and_tucker():
    points, weights, excess = problems()
    step = steps(L2(0.0), points, weights, excess)
    for point, weight, got in zip(points, weights, step, strict=True):
        inside = (point + got > 1e-5) & (point + got < 1 - 1e-5) & (np.abs(weight) > 1e-3)
        if not inside.any():
            continue
        # Where the box does not bind, d is one multiple of w; where it binds, |d| is less.
        multiple = np.median((got / np.where(weight == 0, 1, weight))[inside])
        np.testing.assert_allclose(got[inside], multiple * weight[inside], atol=1e-5)
        assert (np.abs(got) <= np.abs(multiple * weight) + 1e-5).all()


@pytest.mark.parametrize("threat", [Linf(0.0), L2(0.0), L1(0.0)], ids=["Linf", "L2", "L1"])
def test_out_of_reach_goes_to_the_corner(threat):
    points, weights, _ = problems()
    step = steps(threat, points, weights, np.full(len(points), 1e3))
    corner = np.where(weights > 0, -points, np.where(weights < 0, 1 - points, 0))
    np.testing.assert_allclose(step, corner, atol=1e-7)
    assert np.isfinite(steps(threat, points, 0 * weights, np.ones(len(points)))).all()
