"""The attacks that AutoAttack is made of, each with the published code's settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax

from agr_jax import losses
from agr_jax.attacks._apgd import APGD
from agr_jax.attacks._attack import LogitsFn
from agr_jax.attacks._fab import FAB
from agr_jax.attacks._outcome import UnitOutcome
from agr_jax.attacks._square import Square
from agr_jax.threat import L1, L2, Linf


class Member(Protocol):
    """An attack of the ensemble: a frozen dataclass, run in units (restarts x target classes)."""

    @property
    def threat(self) -> Linf | L2 | L1:
        """The ball."""
        ...

    @property
    def passes(self) -> int:
        """Forward passes of one unit for one image; a gradient counts as two more."""
        ...

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of queries after which images that are fooled may leave the batch.

        Empty for an attack whose unit is one program.
        """
        ...

    def units(self, num_classes: int) -> int:
        """Number of units."""
        ...

    def unit(
        self,
        logits_fn: LogitsFn,
        images: jax.Array,
        labels: jax.Array,
        keys: jax.Array,
        index: jax.Array,
    ) -> UnitOutcome:
        """One unit for each image, the `index`-th, `[batch]`."""
        ...


class Ensemble(Protocol):
    """What an evaluation asks of AutoAttack's settings; see `AutoAttack`."""

    @property
    def threat(self) -> Linf | L2 | L1:
        """The ball."""
        ...

    @property
    def version(self) -> str:
        """Which sequence."""
        ...

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        ...

    @property
    def verdict_draws(self) -> int:
        """Draws of a randomised network for each verdict."""
        ...

    @property
    def title(self) -> str:
        """What a table may call it."""
        ...

    @property
    def sequence(self) -> tuple[str, ...]:
        """Names of the members in their order."""
        ...


class Setting(NamedTuple):
    """What a member's settings depend on."""

    threat: Linf | L2 | L1
    version: str
    num_classes: int

    @property
    def is_random(self) -> bool:
        """Whether the network is randomised."""
        return self.version == "rand"

    @property
    def large_radii(self) -> bool:
        """Under L1, whether to begin outside of the ball.

        With `plus` and `rand` the published code keeps to the radius under L1 too.
        """
        return isinstance(self.threat, L1) and self.version not in ("plus", "rand")

    @property
    def restarts(self) -> int:
        """Of the untargeted APGD."""
        is_l1 = isinstance(self.threat, L1) and not self.is_random
        return 5 if self.version == "plus" or is_l1 else 1

    @property
    def apgd(self) -> Callable[..., APGD]:
        """APGD but for its loss.

        A draw that happens to be misclassified is no success: a randomised network is judged by
        fresh draws, at the latest point of a whole run.
        """
        return functools.partial(
            APGD,
            self.threat,
            stop_when_fooled=not self.is_random,
            draws=20 if self.is_random else 0,
            large_radii=self.large_radii,
        )


def _apgd_ce(of: Setting) -> Member:
    return of.apgd(restarts=of.restarts)


def _apgd_dlr(of: Setting) -> Member:
    loss = losses.dlr if of.num_classes >= 3 else losses.margin
    return of.apgd(loss=loss, restarts=of.restarts)


def _apgd_targeted(of: Setting) -> Member:
    loss = losses.targeted_dlr if of.num_classes >= 4 else losses.targeted_margin
    return of.apgd(loss=loss, targets=5 if of.large_radii else 9)


# The order numbers the streams of random numbers: a new member comes last.
_MAKERS: dict[str, Callable[[Setting], Member]] = {
    "apgd-ce": _apgd_ce,
    "apgd-dlr": _apgd_dlr,
    "apgd-t": _apgd_targeted,
    "fab": lambda of: FAB(of.threat, targets=0, restarts=5, stop_when_fooled=True),
    "fab-t": lambda of: FAB(of.threat, targets=9, stop_when_fooled=True),
    "square": lambda of: Square(of.threat),
}
MEMBERS = tuple(_MAKERS)
"""Their names."""


def make_member(name: str, threat: Linf | L2 | L1, version: str, num_classes: int) -> Member:
    """A member with the settings of a version, for a number of classes."""
    return _MAKERS[name](Setting(threat, version, num_classes))
