"""What AGR does with the clean and the adversarial gradient of one leaf."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Interpolation = Literal["cosine", "mean"] | float
Clip = Literal["changed", "interpolated", "all", "none"]
Granularity = Literal["leaf", "global"]

_COSINE_GUARD = 1e-20  # the published code adds this to the product of the norms


@dataclasses.dataclass(frozen=True)
class CombinationRule:
    """The arguments of `agr_transform`, checked, and what they do to one group of arrays.

    A group is what counts as one leaf: an array, or with `granularity="global"` all of them.
    """

    gop_start: int | None
    gics_start: int | None
    interpolation: Interpolation
    interpolate_negative: bool
    clip_norm: float | None
    clip: Clip
    clip_start: int | None
    granularity: Granularity

    def __post_init__(self) -> None:
        for name in ("gop_start", "gics_start", "clip_start"):
            start = getattr(self, name)
            if start is not None and start < 0:
                raise ValueError(f"{name} must be a step >= 0 or None, got {start}")
        if isinstance(self.interpolation, str):
            if self.interpolation not in ("cosine", "mean"):
                raise ValueError(
                    "interpolation must be 'cosine', 'mean' or a number tau in [0, 1], "
                    f"got {self.interpolation!r}"
                )
        elif not 0 <= self.interpolation <= 1:
            raise ValueError(f"interpolation as tau must lie in [0, 1], got {self.interpolation}")
        if self.interpolate_negative and self.interpolation == "cosine":
            raise ValueError(
                "interpolate_negative needs interpolation='mean' or a tau: "
                "a negative cosine is no interpolation weight"
            )
        if self.clip not in ("changed", "interpolated", "all", "none"):
            raise ValueError(
                f"clip must be 'changed', 'interpolated', 'all' or 'none', got {self.clip!r}"
            )
        if self.clip != "none" and not (self.clip_norm and 0 < self.clip_norm < math.inf):
            raise ValueError(
                f"clip_norm must be a positive finite number (or clip='none'), got {self.clip_norm}"
            )
        if self.clip == "all" and self.first_clipped is None:
            raise ValueError(
                "clip='all' with gop_start=None and gics_start=None would never clip: "
                "set clip_start"
            )
        if self.granularity not in ("leaf", "global"):
            raise ValueError(f"granularity must be 'leaf' or 'global', got {self.granularity!r}")

    @property
    def first_clipped(self) -> int | None:
        """Step from which leaves are clipped; `None` for never."""
        if self.clip_start is not None:
            return self.clip_start
        starts = [start for start in (self.gop_start, self.gics_start) if start is not None]
        return min(starts, default=None)

    def groups(self, leaves: list[jax.Array]) -> list[list[jax.Array]]:
        """Splits the leaves of a tree into groups."""
        return [leaves] if self.granularity == "global" else [[leaf] for leaf in leaves]

    def combine(
        self, g_a: list[jax.Array], g_c: list[jax.Array], step: jax.Array
    ) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        """Returns the combined group, and (cosine, projected, clean norm, adversarial norm)."""
        clean, adversarial = _ScaledGroup.of(g_c), _ScaledGroup.of(g_a)
        cosine = adversarial.cosine(clean)
        finite = jnp.isfinite(cosine)
        gop = _is_active(self.gop_start, step)
        gics = _is_active(self.gics_start, step)

        conflict = adversarial.dot(clean) < 0  # also where the cosine is too small for its dtype
        projected = gop & conflict
        eligible = ~projected if self.interpolate_negative else ~conflict
        interpolated = gics & eligible & finite
        changed = projected | interpolated

        # One linear combination, g_c * clean_factor + g_a * adversarial_factor, is both branches.
        weight = self._clean_weight(cosine)
        clean_factor = jnp.where(
            projected, -adversarial.projection_factor(clean), jnp.where(interpolated, weight, 0)
        )
        adversarial_factor = jnp.where(interpolated, 1 - weight, 1)
        poisoned = (gop | gics) & ~finite

        result = []
        for a, c in zip(g_a, g_c, strict=True):
            dtype = _reduction_dtype([a])
            mixed = adversarial_factor * a.astype(dtype) + clean_factor * c.astype(dtype)
            mixed = jnp.where(changed, mixed, a.astype(dtype))
            result.append(jnp.where(poisoned, jnp.nan, mixed))
        selections: dict[Clip, jax.Array | bool] = {
            "changed": changed,
            "interpolated": interpolated,
            "all": True,
            "none": False,
        }
        result = self._clipped(result, selections[self.clip], step)
        result = [r.astype(a.dtype) for r, a in zip(result, g_a, strict=True)]
        return result, (cosine, projected, clean.norm, adversarial.norm)

    def clip_only(self, group: list[jax.Array], step: jax.Array) -> list[jax.Array]:
        """What remains to be done without a clean gradient."""
        wide = [g.astype(_reduction_dtype([g])) for g in group]
        clipped = self._clipped(wide, self.clip == "all", step)
        return [c.astype(g.dtype) for c, g in zip(clipped, group, strict=True)]

    def _clean_weight(self, cosine: jax.Array) -> jax.Array:
        if self.interpolation == "cosine":
            return cosine
        tau = 0.5 if self.interpolation == "mean" else self.interpolation
        return jnp.full_like(cosine, 1 - tau)

    def _clipped(
        self, group: list[jax.Array], selected: jax.Array | bool, step: jax.Array
    ) -> list[jax.Array]:
        if selected is False or self.first_clipped is None or self.clip_norm is None:
            return group
        norm = _ScaledGroup.of(group).norm
        too_long = _is_active(self.first_clipped, step) & selected & ~(norm <= self.clip_norm)
        factor = jnp.where(too_long, self.clip_norm / jnp.where(too_long, norm, 1), 1)
        return [g * factor.astype(_reduction_dtype([g])) for g in group]


class _ScaledGroup(NamedTuple):
    """A group of arrays divided by its largest magnitude, so that squares stay in range."""

    arrays: list[jax.Array]
    scale: jax.Array
    unit_norm: jax.Array  # norm of the divided arrays: 0, or between 1 and sqrt(size)

    @classmethod
    def of(cls, arrays: list[jax.Array]) -> _ScaledGroup:
        dtype = _reduction_dtype(arrays)
        wide = [a.astype(dtype) for a in arrays]
        scale = jnp.zeros([], dtype)
        for a in wide:
            if a.size:
                scale = jnp.maximum(scale, jnp.max(jnp.abs(a)))
        divisor = jnp.where(scale == 0, 1, scale)
        divided = [a / divisor for a in wide]
        squares = sum((jnp.sum(a * a) for a in divided), start=jnp.zeros([], dtype))
        return cls(divided, scale, jnp.sqrt(squares))

    @property
    def norm(self) -> jax.Array:
        return self.scale * self.unit_norm

    @property
    def divisor(self) -> jax.Array:
        return jnp.where(self.scale == 0, 1, self.scale)

    def dot(self, other: _ScaledGroup) -> jax.Array:
        """Inner product of the divided arrays."""
        products = (jnp.sum(a * b) for a, b in zip(self.arrays, other.arrays, strict=True))
        return sum(products, start=jnp.zeros_like(self.scale))

    def cosine(self, other: _ScaledGroup) -> jax.Array:
        """`<a,b> / (|a||b| + 1e-20)`, the reference's guard, evaluated on the divided arrays."""
        norms = self.unit_norm * other.unit_norm
        guard = _COSINE_GUARD / self.divisor / other.divisor
        return jnp.clip(self.dot(other) / (norms + guard), -1, 1)

    def projection_factor(self, onto: _ScaledGroup) -> jax.Array:
        """The k for which self - k * onto is orthogonal to onto; 0 if onto is zero."""
        square = onto.unit_norm**2
        factor = self.dot(onto) / jnp.where(square == 0, 1, square)
        return factor * (self.scale / onto.divisor)


def _is_active(start: int | None, step: jax.Array) -> jax.Array:
    return jnp.asarray(False) if start is None else step >= start


def _reduction_dtype(arrays: list[jax.Array]) -> Any:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32) if arrays else jnp.float32
