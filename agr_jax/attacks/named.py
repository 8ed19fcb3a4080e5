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

`MODULE:FUNCTION` is an attack of your own: a function from a threat model to an attack, which is
compiled, and called as any other, with a key for each image.

`@linf`, `@l2` or `@l1` behind a name asks for another norm than the run's, `pgd20@l2`, and a number
behind that for another radius: `pgd20@linf=16/255`, `autoattack@l2=0.25`. `table1` and `table2`
stand for the columns of the paper's tables.

Under L1 every attack that steps along a gradient means what it means in Python, `pgd(L1(e))`: a
step goes along the sign of the largest 1 % of the gradient. Records of earlier versions call the
dense attack `pgd20@l1`; `agr_jax.evaluation.record_files` tells them by their stored settings.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from agr_jax import losses
from agr_jax.attacks._attack import Attack, LogitsFn, LossFn
from agr_jax.attacks._autoattack.ensemble import AutoAttack
from agr_jax.attacks._autoattack.members import MEMBERS
from agr_jax.attacks._carlini_wagner import CarliniWagnerL2
from agr_jax.attacks._pgd import FGSM, PGD, ifgsm, mim
from agr_jax.attacks._spsa import SPSA
from agr_jax.config import Config, imported
from agr_jax.errors import ConfigError
from agr_jax.threat import L1, L2, NORMS, ThreatModel, expand, is_allowed

TABLES = {
    "table1": ("clean", "fgsm", "pgd20", "pgd100", "cw20", "autoattack"),
    "table2": ("clean", "pgd20@l2", "pgd20-dense@l1", "slide20@l1"),
}


class _Whole(NamedTuple):
    """A name without numbers: what tables call it, and what makes it from a threat model."""

    title: str
    make: Callable[..., Attack]


# An attack with a name of its own is one line here, or one of `_ITERATIVE` below.
_WHOLE: dict[str, _Whole] = {
    "fgsm": _Whole("FGSM", FGSM),
    "cw-l2": _Whole("CW-L2", CarliniWagnerL2),
    "spsa": _Whole("SPSA", SPSA),
}
_ENSEMBLES: dict[str, _Whole] = {
    "autoattack": _Whole("AutoAttack", functools.partial(AutoAttack, version="standard")),
    "autoattack-plus": _Whole("AutoAttack plus", functools.partial(AutoAttack, version="plus")),
    "fast": _Whole("fast (not AutoAttack)", functools.partial(AutoAttack, version="fast")),
    **{
        name: _Whole(name.upper(), functools.partial(AutoAttack, version="custom", attacks=(name,)))
        for name in MEMBERS
    },
}


class _Iterative(NamedTuple):
    """A name with a number of steps; `{}` in a title is that number, with its restarts."""

    title: str
    restarts: bool
    make: Callable[..., Attack]


def _pgd(loss: LossFn, threat: ThreatModel, steps: int, **settings: Any) -> PGD:
    return PGD(threat, steps=steps, loss=loss, **settings)


def _without_step_size(
    make: Callable[..., Attack], threat: ThreatModel, steps: int, **settings: Any
) -> Attack:
    return make(threat, steps=steps)


_ITERATIVE: dict[str, _Iterative] = {
    "pgd": _Iterative("PGD-{}", True, functools.partial(_pgd, losses.cross_entropy)),
    "cw": _Iterative("CW-inf-{}", True, functools.partial(_pgd, losses.margin)),
    "slide": _Iterative("SLIDE-{}", True, functools.partial(_pgd, losses.cross_entropy)),
    "ifgsm": _Iterative("IFGSM-{}", False, functools.partial(_without_step_size, ifgsm)),
    "mim": _Iterative("MIM-{}", False, functools.partial(_without_step_size, mim)),
    "spsa": _Iterative("SPSA-{}", False, functools.partial(_without_step_size, SPSA)),
}
_NUMBERED = re.compile(
    rf"(?P<kind>{'|'.join(_ITERATIVE)})(?P<steps>[1-9]\d*)(x(?P<restarts>[1-9]\d*))?"
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
    whole = _WHOLE.get(plain) or _ENSEMBLES.get(plain)
    shown = whole.title if whole else plain
    if match := _NUMBERED.fullmatch(plain):
        restarts = f" x {match['restarts']}" if match["restarts"] else ""
        shown = _ITERATIVE[match["kind"]].title.format(f"{match['steps']}{restarts}")
        shown += " dense" if match["dense"] else ""
    if plain == "cw-l2":  # which is under L2 alone
        return f"{shown} {radius}".strip()
    return f"{shown}, {norm.capitalize()} {radius}".strip() if norm else shown


def from_config(config: Config) -> dict[str, Attack | None]:
    """The attacks that `config.eval.attacks` names, in their order.

    Raises:
        ConfigError: on an unknown name.
    """
    make_attack = maker(config)
    return {name: make_attack(name) for name in names(config.eval.attacks)}


def maker(config: Config) -> Callable[[str], Attack | None]:
    """What makes the attack that a config means by a name.

    It raises a `ConfigError` on an unknown name.
    """
    attack, settings = config.attack, config.eval
    return functools.partial(
        make,
        norm=attack.norm,
        radii={**settings.radii(), attack.norm: attack.epsilon},
        step_size=settings.step_size,
        batch_size=settings.batch_size,
    )


def make(
    name: str, *, norm: str, radii: Mapping[str, float], step_size: float, batch_size: int
) -> Attack | None:
    """An attack by its name.

    Args:
        name: see above.
        norm: the run's: `linf`, `l2`, `l1`, or `MODULE:FUNCTION` of your own.
        radii: by norm.
        step_size: of PGD and CW in the run's ball; in others it is `2.5 epsilon / steps`.
        batch_size: of AutoAttack.

    Raises:
        ConfigError: on another name, or an attack that is not for this ball.
    """
    if name == "clean":
        return None
    asked = split(name)
    plain, own = asked.attack, asked.norm or norm
    if own not in radii or (asked.radius and not asked.norm) or name.endswith(("@", "=")):
        raise _unknown(name)
    try:
        threat = ball(own, radii[own] if asked.epsilon is None else asked.epsilon)
        if imported.is_imported(plain):
            return _imported(plain, threat)
        if match := _NUMBERED.fullmatch(plain):
            in_the_runs_ball = own == norm and asked.epsilon in (None, radii[norm])
            return _iterative(name, match, threat, step_size if in_the_runs_ball else None)
        if plain == "cw-l2" and not isinstance(threat, L2):
            raise ConfigError(f"config.eval.attacks: {name!r} is for L2 alone: cw-l2@l2")
        if plain in _WHOLE:
            return _WHOLE[plain].make(threat)
        if plain in _ENSEMBLES:
            return _ENSEMBLES[plain].make(threat, batch_size=batch_size)
    except ValueError as error:
        raise ConfigError(f"config.eval.attacks: {name!r}: {error}") from error
    raise _unknown(name)


def ball(norm: str, epsilon: float) -> ThreatModel:
    """The threat model that a config calls `linf`, `l2` or `l1`, or one of your own.

    Args:
        norm: as `config.attack.norm`.
        epsilon: its radius.

    Raises:
        ConfigError: if a function of your own makes no threat model.
        ValueError: if the radius is negative.
    """
    if not imported.is_imported(norm):
        return NORMS[norm](epsilon)
    made = imported.constant("config.attack.norm", norm, epsilon)
    if not isinstance(made, ThreatModel):
        raise ConfigError(
            f"config.attack.norm: {norm} must return an agr_jax.threat.ThreatModel, got "
            f"{type(made).__name__}"
        )
    return made


@dataclasses.dataclass(frozen=True)
class ImportedAttack:
    """An attack of your own that a config names.

    Points that leave the ball, or the box [0, 1], do not count: the image itself stands for them.

    Attributes:
        function: its name, `MODULE:FUNCTION`.
        threat: the ball.
        made: what the function made for this ball.
    """

    function: str
    threat: ThreatModel
    made: Attack

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """As any attack; see the class."""
        points = self.made(logits_fn, images, labels, key)
        if getattr(points, "shape", None) != images.shape:
            raise ConfigError(
                f"config.eval.attacks: {self.function} must return images of shape "
                f"{images.shape}, got {getattr(points, 'shape', type(points).__name__)}"
            )
        allowed = is_allowed(self.threat, images, points)
        return jnp.where(expand(allowed, images), points, images)


def _imported(name: str, threat: ThreatModel) -> ImportedAttack:
    made = imported.constant("config.eval.attacks", name, cast(Hashable, threat))
    if not callable(made):
        raise ConfigError(
            f"config.eval.attacks: {name} must return an attack, a function of logits_fn, images, "
            f"labels and key, got {type(made).__name__}"
        )
    return ImportedAttack(name, threat, made)


def _iterative(
    name: str, match: re.Match[str], threat: ThreatModel, step_size: float | None
) -> Attack:
    kind, steps, restarts = match["kind"], int(match["steps"]), int(match["restarts"] or 1)
    if match["dense"] and (kind not in ("pgd", "cw") or not isinstance(threat, L1)):
        raise ConfigError(
            f"config.eval.attacks: {name!r}: -dense is for pgd and cw under L1 alone: "
            f"pgd{steps}-dense@l1"
        )
    if restarts > 1 and not _ITERATIVE[kind].restarts:
        raise ConfigError(f"config.eval.attacks: {name!r} starts at the image: it has no restarts")
    if kind == "slide" and not isinstance(threat, L1):
        raise ConfigError(f"config.eval.attacks: {name!r} is for L1 alone: slide{steps}@l1")
    if isinstance(threat, L1) and match["dense"]:
        threat = dataclasses.replace(threat, sparsity=None)
    return _ITERATIVE[kind].make(threat, steps, step_size=step_size, restarts=restarts)


def describe(attack: Attack | None) -> dict[str, Any]:
    """An attack's settings as numbers and strings, for JSON."""
    if attack is None:
        return {}
    assert dataclasses.is_dataclass(attack)
    settings = {field.name: getattr(attack, field.name) for field in dataclasses.fields(attack)}
    plain = {name: describe_setting(value) for name, value in settings.items()}
    return {"attack": type(attack).__name__, **plain}


def describe_setting(value: Any) -> Any:
    """One setting as a number or a string: a function by its name, an object by its `repr`.

    An object without a `repr` of its own goes by its type: its address is another in each process.
    """
    if not _is_object(value):
        return value
    if type(value).__repr__ is object.__repr__:
        return type(value).__name__
    return getattr(value, "__name__", None) or repr(value)


def dense_name(name: str) -> str:
    """The name of the dense attack that records of earlier versions call `pgd20@l1` or `cw20@l1`.

    Other names are given back as they are.
    """
    plain, at, threat = name.partition("@")
    match = _NUMBERED.fullmatch(plain)
    is_old = match is not None and match["kind"] in ("pgd", "cw") and not match["dense"]
    return f"{plain}-dense{at}{threat}" if is_old else name


def _is_object(value: Any) -> bool:
    return not isinstance(value, str | int | float | tuple | None)


def _unknown(name: str) -> ConfigError:
    numbered = [
        f"{kind}<steps>{form}"
        for kind, iterative in _ITERATIVE.items()
        for form in (("", "x<restarts>") if iterative.restarts else ("",))
    ]
    known = ["clean", *_WHOLE, *numbered, "pgd<steps>-dense", "cw<steps>-dense", *_ENSEMBLES]
    return ConfigError(
        f"config.eval.attacks: must be of {', '.join(known)}, MODULE:FUNCTION of your own, each "
        f"with {', '.join(f'@{norm}' for norm in NORMS)} for another norm and with @linf=16/255 "
        f"for another radius, {' and '.join(TABLES)}; got {name!r}"
    )
