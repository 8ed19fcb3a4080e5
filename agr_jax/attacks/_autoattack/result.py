"""What AutoAttack found."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from agr_jax.attacks._autoattack.members import Ensemble


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
    """What an evaluation found, image by image.

    Attributes:
        attack: what was run, an `AutoAttack`.
        robust_after: booleans `[examples]` by name, in order: `clean`, then after each attack.
        adversarial: `[examples, ...]`: in the ball and the box, and misclassified, for an image
            that was classified correctly and then fooled; else the image.
        predictions: integers `[examples]`, the network's at `adversarial`.
        seconds: that each attack took, compilation included, over all starts of the evaluation.
        warnings: messages of the checks.
        one_draw: of a randomised network, share of right predictions at `adversarial` over fresh
            draws, which is what one draw is to be expected to have; else `None`.
    """

    attack: Ensemble
    robust_after: dict[str, np.ndarray]
    adversarial: np.ndarray
    predictions: np.ndarray
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    one_draw: float | None = None

    @property
    def robust(self) -> np.ndarray:
        """Booleans `[examples]`, after all attacks."""
        return list(self.robust_after.values())[-1]

    @property
    def robust_accuracy(self) -> float:
        """Share of the images that are classified correctly after all attacks."""
        return float(self.robust.mean())

    def as_dict(self) -> dict[str, Any]:
        """Numbers and strings, for JSON."""
        drawn = {"verdict_draws": self.attack.verdict_draws, "one_draw": self.one_draw}
        return {
            "title": self.attack.title,
            "version": self.attack.version,
            "attacks": list(self.attack.sequence),
            "norm": type(self.attack.threat).__name__,
            "epsilon": self.attack.threat.epsilon,
            "examples": len(self.robust),
            "accuracy": self.robust_accuracy,
            "correct_after": {name: int(mask.sum()) for name, mask in self.robust_after.items()},
            "seconds": {name: round(seconds, 2) for name, seconds in self.seconds.items()},
            "warnings": list(self.warnings),
            **({} if self.one_draw is None else drawn),
        }

    def __str__(self) -> str:
        threat, lines = self.attack.threat, []
        for name, mask in self.robust_after.items():
            took = f"  ({self.seconds[name]:.1f} s)" if name in self.seconds else ""
            lines.append(f"{name:>9}: {100 * mask.mean():6.2f} %{took}")
        if self.one_draw is not None:
            draws = self.attack.verdict_draws
            lines.append(f" one draw: {100 * self.one_draw:6.2f} %, above the majority of {draws}")
        norm = f"{type(threat).__name__} epsilon {threat.epsilon:.4g}"
        return f"{self.attack.title}, {norm}, {len(self.robust)} images\n" + "\n".join(lines)
