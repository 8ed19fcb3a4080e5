"""Properties of AGR's result on generated gradients."""

import functools

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from agr_jax import agr_transform

SIZE = 8  # zeros among the entries make the shorter leaves; one shape compiles once
EPS = float(np.finfo(np.float32).eps)  # two units of roundoff
quick = settings(deadline=None, derandomize=True, max_examples=50, database=None)


def leaves(exponents=8):
    """Float32 vectors of a wide range of lengths; zero vectors and sparse ones among them."""
    entries = st.lists(st.integers(-100, 100), min_size=SIZE, max_size=SIZE)
    scale = st.integers(-exponents, exponents)
    return st.builds(lambda x, e: np.float32(x) * np.float32(2.0**e), entries, scale)


def pairs(**kwargs):
    """(g_a, g_c): independent, or related so that all cosines occur."""
    related = st.builds(
        lambda c, x, k: (np.float32(k * c + x), c),
        leaves(**kwargs),
        leaves(**kwargs),
        st.sampled_from([-4.0, -1.0, -0.25, 0.25, 1.0, 4.0]),
    )
    return st.one_of(st.tuples(leaves(**kwargs), leaves(**kwargs)), related)


@functools.cache
def compiled(**options):
    transform = agr_transform(**({"clip": "none", "clip_norm": None} | options))
    return jax.jit(lambda a, c: transform.update(a, transform.init(a), clean_grads=c))


def agr(g_a, g_c, **options):
    out, _ = compiled(**options)(g_a, g_c)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), out)


def norm(x):
    return np.linalg.norm(np.float64(x))


def dot(x, y):
    return np.vdot(np.float64(x), np.float64(y))


# Rounding of one leaf of n entries, u = EPS / 2: an inner product errs by at most n u |a||c|, the
# norms and the division add less than (n + 4) u, and each of the two products and the sum of
# g = k c + r a one u. Altogether less than (2 n + 8) u = (n + 4) EPS of |a| + |c|.
ROUNDING = (SIZE + 4) * EPS


@quick
@given(pairs())
def test_the_result_descends_both_losses(pair):
    g_a, g_c = pair
    out = agr(g_a, g_c)
    error = ROUNDING * (norm(g_a) + norm(g_c))
    if dot(g_a, g_c) < 0:
        error = ROUNDING * norm(g_a)  # the projection scales g_c to at most |g_a|
    assert dot(out, g_c) >= -error * norm(g_c)
    assert dot(out, g_a) >= -error * norm(g_a)


@quick
@given(pairs())
def test_a_conflict_ends_orthogonal_to_the_clean_gradient(pair):
    g_a, g_c = pair
    g_a = -g_a if dot(g_a, g_c) > 0 else g_a
    out = agr(g_a, g_c, gics_start=None)
    assert abs(dot(out, g_c)) <= ROUNDING * norm(g_a) * norm(g_c)
    assert norm(out) <= norm(g_a) * (1 + ROUNDING)


@quick
@given(pairs(), st.sampled_from([0.01, 0.1, 3.0]))
def test_a_clipped_leaf_is_no_longer_than_the_bound(pair, clip_norm):
    g_a, g_c = pair
    bounded = agr(g_a, g_c, clip="changed", clip_norm=clip_norm)
    free = agr(g_a, g_c)
    # Whatever both parts active return is changed, and at least clipped (plain g_a has no cell).
    assert norm(bounded) <= clip_norm * (1 + ROUNDING)
    shrunk = free * (clip_norm / max(clip_norm, norm(free)))
    assert norm(bounded - shrunk) <= ROUNDING * norm(shrunk)


@quick
@given(pairs(), st.sampled_from([2.0**-8, 0.3, 1.7, 64.0, 1e3]))
def test_positively_homogeneous_before_the_clip(pair, factor):
    g_a, g_c = pair
    scaled = agr(np.float32(factor * g_a), np.float32(factor * g_c))
    error = 2 * ROUNDING * (norm(g_a) + norm(g_c))
    assert norm(scaled - factor * agr(g_a, g_c)) <= factor * error


@quick
@given(pairs(), st.integers(0, 2**31))
def test_invariant_under_an_orthogonal_change_of_basis(pair, seed):
    g_a, g_c = pair
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))
    turn = lambda g: np.float32(basis @ np.float64(g))  # noqa: E731
    for clip in ({}, {"clip": "changed", "clip_norm": 1e6}):
        turned = agr(turn(g_a), turn(g_c), **clip)
        error = 2 * ROUNDING * (norm(g_a) + norm(g_c))
        assert norm(turned - basis @ agr(g_a, g_c, **clip)) <= error


@quick
@given(st.lists(pairs(), min_size=3, max_size=3), st.permutations(range(3)))
def test_leaves_do_not_see_each_other(three, order):
    g_a, g_c = [p[0] for p in three], [p[1] for p in three]
    options = {"clip": "changed", "clip_norm": 0.5}
    out = agr(g_a, g_c, **options)
    permuted = agr([g_a[i] for i in order], [g_c[i] for i in order], **options)
    for place, i in enumerate(order):
        np.testing.assert_array_equal(permuted[place], out[i])


@quick
@given(pairs())
def test_tau_of_one_is_adversarial_training(pair):
    g_a, g_c = pair
    for negative in (False, True):
        out = agr(g_a, g_c, gop_start=None, interpolation=1.0, interpolate_negative=negative)
        np.testing.assert_array_equal(out, g_a)


@quick
@given(pairs())
def test_tau_of_one_half_is_the_mean(pair):
    g_a, g_c = pair
    options = {"gop_start": None, "interpolate_negative": True}
    mean = agr(g_a, g_c, interpolation="mean", **options)
    np.testing.assert_array_equal(agr(g_a, g_c, interpolation=0.5, **options), mean)
    expected = (np.float64(g_a) + np.float64(g_c)) / 2
    assert norm(mean - expected) <= EPS * (norm(g_a) + norm(g_c))


@quick
@given(pairs(exponents=50), st.sampled_from(["none", "changed", "all"]))
def test_finite_gradients_give_a_finite_result(pair, clip):
    # Entries from 1e-15 to 1e17: the quotient of two such lengths still is a float32.
    g_a, g_c = pair
    for interpolation in ("cosine", "mean"):
        clip_norm = None if clip == "none" else 0.1
        out = agr(g_a, g_c, interpolation=interpolation, clip=clip, clip_norm=clip_norm)
        assert np.all(np.isfinite(out))
        assert norm(out) <= (norm(g_a) + norm(g_c)) * (1 + ROUNDING)
