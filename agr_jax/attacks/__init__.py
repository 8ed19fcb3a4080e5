"""Attacks: frozen objects called as `attack(logits_fn, images, labels, key)`.

The lower-case names are the public ones: `attacks.pgd(Linf(8 / 255), steps=20)` makes an attack.
"""

from collections.abc import Callable

import jax

from agr_jax.attacks.pgd import FGSM, PGD, LogitsFn

Attack = Callable[[LogitsFn, jax.Array, jax.Array, jax.Array], jax.Array]
fgsm = FGSM
pgd = PGD

__all__ = ["FGSM", "PGD", "Attack", "LogitsFn", "fgsm", "pgd"]
