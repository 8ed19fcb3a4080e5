"""Attacks: frozen objects called as `attack(logits_fn, images, labels, key)`.

The lower-case names are the public ones: `attacks.pgd(Linf(8 / 255), steps=20)` makes an attack.
"""

import warnings
from typing import Any

from agr_jax.attacks._apgd import APGD
from agr_jax.attacks._attack import Attack, LogitsFn
from agr_jax.attacks._autoattack.ensemble import AutoAttack
from agr_jax.attacks._autoattack.result import AutoAttackResult
from agr_jax.attacks._carlini_wagner import CarliniWagnerL2
from agr_jax.attacks._checks import EvaluationWarning
from agr_jax.attacks._fab import FAB
from agr_jax.attacks._outcome import UnitOutcome
from agr_jax.attacks._pgd import FGSM, PGD, cw_inf, ifgsm, mim
from agr_jax.attacks._spsa import SPSA
from agr_jax.attacks._square import Square

fgsm = FGSM
pgd = PGD
apgd = APGD
fab = FAB
square = Square
spsa = SPSA
autoattack = AutoAttack
cw_l2 = CarliniWagnerL2

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "PGD",
    "SPSA",
    "Attack",
    "AutoAttack",
    "AutoAttackResult",
    "CarliniWagnerL2",
    "EvaluationWarning",
    "LogitsFn",
    "Square",
    "UnitOutcome",
    "apgd",
    "autoattack",
    "cw_inf",
    "cw_l2",
    "fab",
    "fgsm",
    "ifgsm",
    "mim",
    "pgd",
    "spsa",
    "square",
]


def __getattr__(name: str) -> Any:
    """Names of before."""
    if name == "Outcome":
        warnings.warn(
            "attacks.Outcome is attacks.UnitOutcome now", DeprecationWarning, stacklevel=2
        )
        return UnitOutcome
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
