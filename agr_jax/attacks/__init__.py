"""Attacks: frozen objects called as `attack(logits_fn, images, labels, key)`.

The lower-case names are the public ones: `attacks.pgd(Linf(8 / 255), steps=20)` makes an attack.
"""

from agr_jax.attacks.apgd import APGD
from agr_jax.attacks.attack import Attack, EvaluationWarning, LogitsFn, Outcome
from agr_jax.attacks.autoattack import AutoAttack
from agr_jax.attacks.autoattack_result import AutoAttackResult
from agr_jax.attacks.carlini_wagner import CarliniWagnerL2
from agr_jax.attacks.fab import FAB
from agr_jax.attacks.pgd import FGSM, PGD, cw_inf, ifgsm, mim
from agr_jax.attacks.spsa import SPSA
from agr_jax.attacks.square import Square

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
    "Outcome",
    "Square",
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
