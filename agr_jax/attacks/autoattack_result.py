"""What AutoAttack found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from agr_jax.attacks.autoattack import AutoAttack


@dataclasses.dataclass(frozen=True)
class AutoAttackResult:
    """What an evaluation found, image by image.

    Attributes:
        attack: what was run.
        robust_after: booleans `[examples]` by name, in order: `clean`, then after each attack.
        adversarial: `[examples, ...]`: in the ball and the box, and misclassified, for an image
            that was classified correctly and then fooled; else the image.
        predictions: integers `[examples]`, the network's at `adversarial`.
        seconds: that each attack took, compilation included, over all starts of the evaluation.
        warnings: messages of the checks.
    """

    attack: AutoAttack
    robust_after: dict[str, np.ndarray]
    adversarial: np.ndarray
    predictions: np.ndarray
    seconds: dict[str, float]
    warnings: tuple[str, ...]

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
        }

    def __str__(self) -> str:
        threat, lines = self.attack.threat, []
        for name, mask in self.robust_after.items():
            took = f"  ({self.seconds[name]:.1f} s)" if name in self.seconds else ""
            lines.append(f"{name:>9}: {100 * mask.mean():6.2f} %{took}")
        norm = f"{type(threat).__name__} epsilon {threat.epsilon:.4g}"
        return f"{self.attack.title}, {norm}, {len(self.robust)} images\n" + "\n".join(lines)
