"""What docs/theory.md proves, evaluated in numbers."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agr_jax import agr_transform

# ---- Theorem 4.1

SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**31 - 1)


def combined(clean, adversarial, **options):
    optimizer = agr_transform(**{"gop_start": 0, "gics_start": 0, "clip": "changed", **options})
    params = {"leaf": jnp.zeros(len(clean))}
    updates, _ = optimizer.update(
        {"leaf": jnp.asarray(adversarial, jnp.float32)},
        optimizer.init(params),
        params,
        clean_grads={"leaf": jnp.asarray(clean, jnp.float32)},
    )
    return np.asarray(updates["leaf"], float)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(SIZES, SEEDS, st.floats(-3, 3))
def test_an_agr_update_ascends_neither_loss(size, seed, scale):
    generator = np.random.default_rng(seed)
    clean = generator.standard_normal(size) * 10**scale
    adversarial = generator.standard_normal(size)
    found = combined(clean, adversarial, clip_norm=0.1)
    # Float32: under GOP what is left of g_a along g_c is rounding.
    noise = 1e-5 * np.linalg.norm(found) + 1e-6 * np.linalg.norm(adversarial)
    assert found @ clean >= -noise * np.linalg.norm(clean)
    assert found @ adversarial >= -noise * np.linalg.norm(adversarial)


@pytest.mark.parametrize("cosine", [-0.999, -0.6, -0.1, 0.0, 0.3, 0.8, 0.999])
@pytest.mark.parametrize("clean_norm", [0.1, 1.0, 7.0])
def test_both_rates_are_those_of_the_proof(cosine, clean_norm):
    clean = clean_norm * np.array([1.0, 0.0])
    adversarial = 2 * np.array([cosine, np.sqrt(1 - cosine**2)])
    found = combined(clean, adversarial, clip="none", clip_norm=None)
    if cosine < 0:
        rates = 0.0, 4 * (1 - cosine**2)
    else:
        rates = (
            cosine * clean_norm**2 + (1 - cosine) * cosine * 2 * clean_norm,
            cosine**2 * 2 * clean_norm + (1 - cosine) * 4,
        )
    np.testing.assert_allclose((found @ clean, found @ adversarial), rates, atol=1e-5)
    # Point 5: no direction of the same length lowers the adversarial loss faster than g_a.
    assert found @ adversarial / np.linalg.norm(found) <= 2 * (1 + 1e-6)


def test_a_quadratic_loss_falls_below_the_step_size_of_the_proof():
    """L-smooth losses with known L: both fall for every step size below the bound."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        factors = generator.uniform(0.1, 3, (2, 4))  # Hessians, diagonal
        centres = generator.standard_normal((2, 4))
        point = generator.standard_normal(4)

        def loss(weights, hessian, centre):
            return 0.5 * (hessian * (weights - centre) ** 2).sum()

        clean, adversarial = (f * (point - c) for f, c in zip(factors, centres, strict=True))
        found = combined(clean, adversarial, clip="none", clip_norm=None)
        for gradient, f, c in zip((clean, adversarial), factors, centres, strict=True):
            if found @ gradient <= 1e-4:
                continue
            step = 1.9 * (found @ gradient) / (f.max() * (found @ found))
            for share in (0.01, 0.5, 1.0):
                assert loss(point - share * step * found, f, c) < loss(point, f, c)


def test_it_fails_without_its_conditions():
    clean, adversarial = np.array([1.0, 0.0]), np.array([-0.9, 0.1])
    assert combined(clean, adversarial, gop_start=None) @ clean < 0  # point 4
    tau = combined(clean, adversarial, gop_start=None, interpolation=0.9, interpolate_negative=True)
    assert tau @ clean < 0  # point 3
    tau = combined(clean, adversarial, gop_start=None, interpolation=0.1, interpolate_negative=True)
    assert tau @ adversarial < 0  # and for the other gradient
    gop_alone = combined(clean, np.array([0.9, 0.1]), gics_start=None)
    assert gop_alone @ clean > 0  # point 4: it needs no GICS
    # Point 1: along GOP's direction a curved clean loss rises for every step size.
    found = combined(clean, adversarial, clip="none", clip_norm=None)

    def curved(weights):
        return weights[0] + 5 * weights[1] ** 2

    assert abs(found @ clean) < 1e-6
    assert all(curved(-step * found) > curved(0 * found) for step in (1e-3, 1e-2, 1e-1))


# ---- Theorem 4.3


def rademacher(losses):
    """Of a finite class on one sample, exactly: the mean over all signs of the best correlation.

    `losses` is [functions, examples].
    """
    examples = losses.shape[1]
    signs = np.array(list(itertools.product((-1, 1), repeat=examples)))
    return (signs @ losses.T / examples).max(1).mean()


def last_term(lam, n, m, delta):
    return np.sqrt((lam**2 / n + (1 - lam) ** 2 / m) * np.log(1 / delta) / 2)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize(("n", "m"), [(8, 8), (4, 10)])
def test_the_bound_holds_as_often_as_it_says(lam, n, m):
    """A class of four functions on a distribution of six points; complexities from 60 draws."""
    generator = np.random.default_rng(0)
    clean_losses, adversarial_losses = generator.uniform(0, 1, (2, 4, 6))
    true = lam * clean_losses.mean(1) + (1 - lam) * adversarial_losses.mean(1)
    draws = [(generator.integers(0, 6, n), generator.integers(0, 6, m)) for _ in range(400)]
    complexity = np.mean(
        [
            lam * rademacher(clean_losses[:, s]) + (1 - lam) * rademacher(adversarial_losses[:, t])
            for s, t in draws[:60]
        ]
    )
    delta = 0.2

    def held(margin):
        return np.mean(
            [
                np.all(
                    true
                    <= lam * clean_losses[:, s].mean(1)
                    + (1 - lam) * adversarial_losses[:, t].mean(1)
                    + margin
                )
                for s, t in draws
            ]
        )

    assert held(2 * complexity + last_term(lam, n, m, delta)) >= 1 - delta
    assert held(0) < 1 - delta  # so that the margin is needed


def test_mcdiarmids_differences_are_those_of_the_proof():
    """The largest change of D when one example changes, over all of them: lambda / n."""
    lam, n = 0.3, 3
    losses = np.array([[0.0, 1.0]])  # one function, two points, loss 0 or 1
    risk = losses.mean(1)

    def gap(sample, other):
        empirical = lam * losses[:, sample].mean(1) + (1 - lam) * losses[:, other].mean(1)
        return (risk - empirical).max()

    samples = [list(s) for s in itertools.product((0, 1), repeat=n)]
    largest = max(abs(gap(s, [0] * n) - gap([1 - s[0], *s[1:]], [0] * n)) for s in samples)
    assert largest == pytest.approx(lam / n)
    largest = max(abs(gap([0] * n, s) - gap([0] * n, [1 - s[0], *s[1:]])) for s in samples)
    assert largest == pytest.approx((1 - lam) / n)
    # On the same images for both losses: 1 / n.
    largest = max(abs(gap(s, s) - gap([1 - s[0], *s[1:]], [1 - s[0], *s[1:]])) for s in samples)
    assert largest == pytest.approx(1 / n)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_last_term_bounds_the_deviation_from_the_mean(lam):
    """One function of loss 0 or 1, of binomial means: D exceeds its own mean, 0, by chance alone.

    The bracket beside the root, as printed, is exceeded far more often than delta allows.
    """
    generator = np.random.default_rng(0)
    n, m, delta = 400, 300, 0.2
    clean, adversarial = (generator.binomial(size, 0.5, 20_000) / size for size in (n, m))
    gap = 0.5 - (lam * clean + (1 - lam) * adversarial)
    bracket = lam**2 / n + (1 - lam) ** 2 / m
    assert np.mean(gap > last_term(lam, n, m, delta)) <= delta
    assert np.mean(gap > bracket * np.sqrt(np.log(1 / delta) / 2)) > 2 * delta


def test_lambda_0_gives_adversarial_trainings_bound_only_with_the_bracket_under_the_root():
    n, m, delta = 50_000, 50_000, 0.05
    of_at = np.sqrt(np.log(1 / delta) / (2 * m))
    assert last_term(0.0, n, m, delta) == pytest.approx(of_at)
    beside = ((0.0**2 / n) + (1 - 0.0) ** 2 / m) * np.sqrt(np.log(1 / delta) / 2)
    assert beside < of_at / 100


def test_the_last_term_is_smallest_in_between():
    lams = np.linspace(0, 1, 11)
    terms = [last_term(lam, 100, 100, 0.1) for lam in lams]
    assert lams[int(np.argmin(terms))] == 0.5
