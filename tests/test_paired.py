"""Paired comparisons of two runs, and means over runs."""

import numpy as np
import pytest

from agr_jax.report.paired import Discordant, mcnemar, mean_and_deviation, percent


@pytest.mark.parametrize(
    ("gained", "lost", "expected"),
    # By hand: 2 * sum of binomial coefficients / 2^n.
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_mcnemars_exact_test(gained, lost, expected):
    first = np.array([1] * gained + [0] * lost + [1, 0, 1], bool)
    second = np.array([0] * gained + [1] * lost + [1, 0, 1], bool)
    assert mcnemar(first, second) == Discordant(gained, lost, pytest.approx(expected))
    assert mcnemar(second, first).p_value == pytest.approx(expected)


def test_mcnemar_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, second = generator.random((2, 300)) < 0.6
        found = mcnemar(first, second)
        test = stats.binomtest(found.gained, found.gained + found.lost)
        assert found.p_value == pytest.approx(test.pvalue)
    with pytest.raises(ValueError, match="the same images"):
        mcnemar(first, second[:-1])


def test_mean_and_deviation_over_runs():
    assert mean_and_deviation([3.0]) == (3.0, None)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert percent([0.5]) == "50.00"
    assert percent([0.1, 0.3]) == "20.00 ± 14.14"
