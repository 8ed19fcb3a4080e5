"""Comparisons of two runs on the same images, and of repetitions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Discordant:
    """Images on which two runs disagree.

    Attributes:
        gained: correct in the first run alone.
        lost: correct in the second run alone.
        p_value: of McNemar's exact test that both are equally likely, two-sided.
    """

    gained: int
    lost: int
    p_value: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> Discordant:
    """Compares two runs on the same images.

    Args:
        first: booleans `[images]`, which are classified correctly.
        second: the same for the other run.

    Raises:
        ValueError: if the numbers of images differ.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions",
    1947; the exact binomial form.

    Example:
        >>> import numpy as np
        >>> mcnemar(np.array([1, 1, 1, 0], bool), np.array([0, 0, 1, 0], bool))
        Discordant(gained=2, lost=0, p_value=0.5)
    """
    if first.shape != second.shape:
        raise ValueError(f"expected the same images, got {first.shape} and {second.shape}")
    gained = int((first & ~second).sum())
    lost = int((second & ~first).sum())
    return Discordant(gained, lost, _two_sided_binomial(min(gained, lost), gained + lost))


def _two_sided_binomial(fewer: int, both: int) -> float:
    """Twice the probability of at most `fewer` heads in `both` throws of a fair coin, at most 1."""
    tail = sum(math.comb(both, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**both)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation over repetitions (n - 1), `None` for a single one."""
    if len(values) == 1:
        return values[0], None
    return float(np.mean(values)), float(np.std(values, ddof=1))


def percent(values: Sequence[float]) -> str:
    """Accuracies in [0, 1] as a table shows them: mean and deviation over runs, in percent."""
    mean, deviation = mean_and_deviation([100 * value for value in values])
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"
