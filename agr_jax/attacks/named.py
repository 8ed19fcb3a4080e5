"""Attacks by the names that configs and tables use.

| name | attack |
|---|---|
| `clean` | none |
| `fgsm` | FGSM |
| `ifgsm<n>` | n steps of epsilon / n from the image |
| `pgd<n>`, `pgd<n>x<r>` | PGD, n steps, from r random starts |
| `cw<n>`, `cw<n>x<r>` | PGD on the margin, the "CW-inf" of adversarial training papers |
| `pgd<n>-dense`, `cw<n>-dense` | the same under L1 along the dense gradient, which is far weaker |
| `slide<n>` | under L1: another name of `pgd<n>` there, SLIDE |
| `mim<n>` | momentum iterative method, n steps of epsilon / n from the image |
| `cw-l2` | the L2 attack of Carlini and Wagner, 9 weights of 1,000 steps; under L2 alone |
| `spsa`, `spsa<n>` | SPSA, n steps of Adam (100) |
| `apgd-ce`, `apgd-dlr`, `apgd-t`, `fab`, `fab-t`, `square` | one attack of AutoAttack, alone |
| `autoattack`, `autoattack-plus` | AutoAttack |
| `fast` | APGD-CE and targeted APGD, which is not AutoAttack |

`@linf`, `@l2` or `@l1` behind a name asks for another norm than the run's, `pgd20@l2`, and a number
behind that for another radius: `pgd20@linf=16/255`, `autoattack@l2=0.25`. `table1` and `table2`
stand for the columns of the paper's tables.

Under L1 every attack that steps along a gradient means what it means in Python, `pgd(L1(e))`: a
step goes along the sign of the largest 1 % of the gradient. Records of earlier versions call the
dense attack `pgd20@l1`; `agr_jax.evaluation_records` tells them by their stored settings.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from agr_jax import losses
from agr_jax.attacks.attack import Attack
from agr_jax.attacks.autoattack import AutoAttack
from agr_jax.attacks.autoattack_run import ATTACKS
from agr_jax.attacks.carlini_wagner import CarliniWagnerL2
from agr_jax.attacks.pgd import FGSM, PGD, ifgsm, mim
from agr_jax.attacks.spsa import SPSA
from agr_jax.errors import ConfigError
from agr_jax.threat import L1, L2, Linf

TABLES = {
    "table1": ("clean", "fgsm", "pgd20", "pgd100", "cw20", "autoattack"),
    "table2": ("clean", "pgd20@l2", "pgd20-dense@l1", "slide20@l1"),
}
_NORMS: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
_SINGLE: dict[str, Any] = {"fgsm": FGSM, "cw-l2": CarliniWagnerL2, "spsa": SPSA}
_VERSIONS: dict[str, Any] = {
    "autoattack": "standard",
    "autoattack-plus": "plus",
    "fast": "fast",
}
_ITERATIVE = re.compile(
    r"(?P<kind>pgd|ifgsm|mim|slide|cw)(?P<steps>[1-9]\d*)(x(?P<restarts>[1-9]\d*))?"
    r"(?P<dense>-dense)?"
)
_RADIUS = re.compile(r"\d+/\d+|\d+(\.\d+)?(e[-+]?\d{1,3})?")


class Name(NamedTuple):
    """A name taken apart.

    Attributes:
        attack: what comes before `@`.
        norm: behind `@`; empty for the run's.
        radius: behind `=`, as it is written; empty for the one that belongs to the norm.
    """

    attack: str
    norm: str
    radius: str

    @property
    def epsilon(self) -> float | None:
        """The radius as a number.

        Raises:
            ValueError: if it is none.
        """
        if not self.radius:
            return None
        try:
            if _RADIUS.fullmatch(self.radius):
                return float(Fraction(self.radius))
        except (ZeroDivisionError, OverflowError):
            pass
        raise ValueError(
            f"{self.radius!r} is no number, such as 0.05, and no fraction, such as 8/255"
        )


def split(name: str) -> Name:
    """Takes a name apart: `pgd20@linf=16/255`."""
    attack, _, threat = name.partition("@")
    norm, _, radius = threat.partition("=")
    return Name(attack, norm, radius)


def names(asked: Sequence[str]) -> list[str]:
    """The names with each table's put in its place, once each."""
    spelled_out = [inner for name in asked for inner in TABLES.get(name, (name,))]
    return list(dict.fromkeys(spelled_out))


def title(name: str) -> str:
    """What a table calls an attack."""
    plain, norm, radius = split(name)
    if plain == "clean":
        shown = plain
    elif plain.startswith("autoattack"):
        shown = plain.replace("autoattack", "AutoAttack").replace("-", " ")
    elif plain == "fast":
        shown = "fast (not AutoAttack)"
    elif plain == "cw-l2":
        return f"CW-L2 {radius}".strip()
    elif match := _ITERATIVE.fullmatch(plain):
        kind = "CW-inf" if match["kind"] == "cw" else match["kind"].upper()
        restarts = f" x {match['restarts']}" if match["restarts"] else ""
        shown = f"{kind}-{match['steps']}{restarts}{' dense' if match['dense'] else ''}"
    else:
        shown = re.sub(r"^SPSA(\d)", r"SPSA-\1", plain.upper())
    return f"{shown}, {norm.capitalize()} {radius}".strip() if norm else shown


def make(
    name: str, *, norm: str, radii: Mapping[str, float], step_size: float, batch_size: int
) -> Attack | None:
    """An attack by its name.

    Args:
        name: see above.
        norm: the run's, `linf`, `l2` or `l1`.
        radii: by norm.
        step_size: of PGD and CW in the run's ball; in others it is `2.5 epsilon / steps`.
        batch_size: of AutoAttack.

    Raises:
        ConfigError: on another name.
    """
    if name == "clean":
        return None
    asked = split(name)
    plain, own = asked.attack, asked.norm or norm
    if own not in _NORMS or (asked.radius and not asked.norm) or name.endswith(("@", "=")):
        raise _unknown(name)
    try:
        threat = _NORMS[own](radii[own] if asked.epsilon is None else asked.epsilon)
    except ValueError as error:
        raise ConfigError(f"config.eval.attacks: {name!r}: {error}") from error
    match = _ITERATIVE.fullmatch(plain)
    if match is not None:
        in_the_runs_ball = own == norm and asked.epsilon in (None, radii[norm])
        return _iterative(name, match, threat, step_size if in_the_runs_ball else None)
    if plain == "cw-l2" and not isinstance(threat, L2):
        raise ConfigError(f"config.eval.attacks: {name!r} is for L2 alone: cw-l2@l2")
    if plain in _SINGLE:
        return _SINGLE[plain](threat)
    if match := re.fullmatch(r"spsa([1-9]\d*)", plain):
        return SPSA(threat, steps=int(match[1]))
    if plain in _VERSIONS:
        return AutoAttack(threat, version=_VERSIONS[plain], batch_size=batch_size)
    if plain in ATTACKS:
        return AutoAttack(threat, version="custom", attacks=(plain,), batch_size=batch_size)
    raise _unknown(name)


def _iterative(
    name: str, match: re.Match[str], threat: Linf | L2 | L1, step_size: float | None
) -> PGD:
    kind, steps, restarts = match["kind"], int(match["steps"]), int(match["restarts"] or 1)
    if match["dense"] and (kind not in ("pgd", "cw") or not isinstance(threat, L1)):
        raise ConfigError(
            f"config.eval.attacks: {name!r}: -dense is for pgd and cw under L1 alone: "
            f"pgd{steps}-dense@l1"
        )
    if kind in ("ifgsm", "mim"):
        if restarts > 1:
            raise ConfigError(
                f"config.eval.attacks: {name!r} starts at the image: it has no restarts"
            )
        return (ifgsm if kind == "ifgsm" else mim)(threat, steps)
    if kind == "slide" and not isinstance(threat, L1):
        raise ConfigError(f"config.eval.attacks: {name!r} is for L1 alone: slide{steps}@l1")
    if isinstance(threat, L1) and match["dense"]:
        threat = dataclasses.replace(threat, sparsity=None)
    loss = losses.margin if kind == "cw" else losses.cross_entropy
    return PGD(threat, steps=steps, step_size=step_size, loss=loss, restarts=restarts)


def describe(attack: Attack | None) -> dict[str, Any]:
    """An attack's settings as numbers and strings, for JSON."""
    if attack is None:
        return {}
    assert dataclasses.is_dataclass(attack)
    settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    plain = {name: describe_setting(value) for name, value in settings.items()}
    return {"attack": type(attack).__name__, **plain}


def describe_setting(value: Any) -> Any:
    """One setting as a number or a string: a function by its name, an object by its `repr`."""
    return getattr(value, "__name__", None) or (repr(value) if _is_object(value) else value)


def dense_name(name: str) -> str:
    """The name of the dense attack that records of earlier versions call `pgd20@l1` or `cw20@l1`.

    Other names are given back as they are.
    """
    plain, at, threat = name.partition("@")
    match = _ITERATIVE.fullmatch(plain)
    is_old = match is not None and match["kind"] in ("pgd", "cw") and not match["dense"]
    return f"{plain}-dense{at}{threat}" if is_old else name


def _is_object(value: Any) -> bool:
    return not isinstance(value, str | int | float | tuple | None)


def _unknown(name: str) -> ConfigError:
    return ConfigError(
        "config.eval.attacks: must be of clean, fgsm, ifgsm<steps>, pgd<steps>, "
        "pgd<steps>x<restarts>, cw<steps>, pgd<steps>-dense, cw<steps>-dense, slide<steps>, "
        "mim<steps>, cw-l2, spsa, spsa<steps>, "
        f"autoattack, autoattack-plus, fast, {', '.join(ATTACKS)}, each with @linf, @l2 or @l1 for "
        "another norm and with @linf=16/255 for another radius, table1 and table2; got "
        f"{name!r}"
    )
