"""Ranges of numeric arguments: for the fields of configs, and for those of attacks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax


class Range(NamedTuple):
    """Bounds of a number: low <= value <= high, or low < value with `above`.

    Example:
        >>> from agr_jax.ranges import Range
        >>> str(Range(0, 1, above=True)), Range(1).holds(0)
        ('above 0 and at most 1', False)
    """

    low: float
    high: float = float("inf")
    above: bool = False

    def __str__(self) -> str:
        least = f"above {self.low}" if self.above else f"at least {self.low}"
        return least if self.high == float("inf") else f"{least} and at most {self.high}"

    def holds(self, value: float) -> bool:
        """Whether a value lies in the range; infinities and NaN never do."""
        inside = self.low <= value <= self.high and math.isfinite(value)
        return inside and not (self.above and value == self.low)


def check_ranges(settings: Any, **ranges: Range) -> None:
    """Refuses fields of a dataclass that are out of their range.

    Arguments of the caller's own `jit`, whose values are not known, are not looked at.

    Raises:
        ValueError: naming the first such field, its value and its range.
    """
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        if not isinstance(value, jax.core.Tracer) and not allowed.holds(value):
            raise ValueError(f"{type(settings).__name__}.{name} must be {allowed}, got {value}")
