"""What AGR does with the leaves of the clean and the adversarial gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Interpolation = Literal["cosine", "mean"] | float
Clip = Literal["changed", "interpolated", "all", "none"]
Granularity = Literal["leaf", "global"]

_COSINE_GUARD = 1e-20  # the published code adds this to the product of the norms


@dataclasses.dataclass(frozen=True)
class CombinationRule:
    """The arguments of `agr_transform`, checked, and what they do to the leaves.

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
        for name in ("gop_start", "gics_start", "clip_start", "interpolation", "clip_norm"):
            if callable(getattr(self, name)):
                raise ValueError(
                    f"agr_transform takes no schedule as {name}: write "
                    f"optax.inject_hyperparams(agr_transform)({name}=schedule)"
                )
        for name in ("gop_start", "gics_start", "clip_start"):
            start = getattr(self, name)
            if start is not None and not _is_traced(start) and start < 0:
                raise ValueError(f"{name} must be a step >= 0 or None, got {start}")
        if isinstance(self.interpolation, str):
            if self.interpolation not in ("cosine", "mean"):
                raise ValueError(
                    "interpolation must be 'cosine', 'mean' or a number tau in [0, 1], "
                    f"got {self.interpolation!r}"
                )
        elif not _is_traced(self.interpolation) and not 0 <= self.interpolation <= 1:
            raise ValueError(f"interpolation as tau must lie in [0, 1], got {self.interpolation}")
        if self.interpolate_negative and self._by_cosine:
            raise ValueError(
                "interpolate_negative needs interpolation='mean' or a tau: "
                "a negative cosine is no interpolation weight"
            )
        if self.clip not in ("changed", "interpolated", "all", "none"):
            raise ValueError(
                f"clip must be 'changed', 'interpolated', 'all' or 'none', got {self.clip!r}"
            )
        traced = _is_traced(self.clip_norm)
        if self.clip != "none" and not (
            traced or (self.clip_norm is not None and 0 < self.clip_norm < math.inf)
        ):
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
    def first_clipped(self) -> int | jax.Array | None:
        """Step from which leaves are clipped; `None` for never."""
        if self.clip_start is not None:
            return self.clip_start
        starts = [start for start in (self.gop_start, self.gics_start) if start is not None]
        if any(_is_traced(start) for start in starts):
            return functools.reduce(jnp.minimum, map(jnp.asarray, starts))
        return min(starts, default=None)

    @property
    def _by_cosine(self) -> bool:
        return isinstance(self.interpolation, str) and self.interpolation == "cosine"

    def combine(
        self, g_a: list[jax.Array], g_c: list[jax.Array], step: jax.Array
    ) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        """Returns the combined leaves, and (cosine, projected, clean norm, adversarial norm).

        Those are `[groups]`: what is decided for every group is decided for all at once, since
        scalars one by one would be thousands of instructions to compile and kernels to launch.
        """
        parts = self._parts(g_a, g_c)
        if len(parts) == 1:
            return self._combine(g_a, g_c, step)
        found = [self._combine(_take(g_a, part), _take(g_c, part), step) for part in parts]
        order = np.argsort([i for part in parts for i in part])
        result = _take([leaf for leaves, _ in found for leaf in leaves], order)
        columns = zip(*(measured for _, measured in found), strict=True)
        return result, tuple(jnp.concatenate(column)[order] for column in columns)

    def _combine(
        self, g_a: list[jax.Array], g_c: list[jax.Array], step: jax.Array
    ) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        dtype = _reduction_dtype(g_a + g_c)
        groups, clean_groups = self._groups(g_a, dtype), self._groups(g_c, dtype)
        clean, adversarial = _Scaled.of(clean_groups), _Scaled.of(groups)
        dot = _inner_products(adversarial.groups, clean.groups)
        cosine = adversarial.cosine(clean, dot)
        finite = jnp.isfinite(cosine)
        gop = _is_active(self.gop_start, step)
        gics = _is_active(self.gics_start, step)

        conflict = finite & (dot < 0)  # also where the cosine is too small for its dtype
        projected = gop & conflict
        eligible = ~projected if self.interpolate_negative else ~conflict
        interpolated = gics & eligible & finite
        changed = projected | interpolated

        # One linear combination, g_c * clean_factor + g_a * adversarial_factor, is both branches.
        # (Both end in a division: XLA repeats what is cheap wherever a leaf uses it.)
        weight = self._clean_weight(cosine)
        square_ratio = clean.unit_norm**2 * (clean.scale / adversarial.scale)
        clean_part = jnp.where(projected, -dot, jnp.where(interpolated, weight, 0))
        clean_factor = clean_part / jnp.where(projected, square_ratio, 1)
        poisoned = (gop | gics) & ~finite
        adversarial_part = jnp.where(interpolated, 1 - weight, 1)
        adversarial_factor = adversarial_part / jnp.where(poisoned, jnp.nan, 1)

        result = groups
        if self.gop_start is not None or self.gics_start is not None:  # not for diagnostics alone
            result = [
                [
                    _linear_combination(clean_factor[i], c, adversarial_factor[i], a)
                    for c, a in zip(*pair, strict=True)
                ]
                for i, pair in enumerate(zip(clean_groups, groups, strict=True))
            ]
        selections: dict[Clip, jax.Array | bool] = {
            "changed": changed,
            "interpolated": interpolated,
            "all": True,
            "none": False,
        }
        result = self._clipped(result, selections[self.clip], step)
        measured = (cosine, projected, clean.norm, adversarial.norm)
        return _as_leaves(result, g_a), measured

    def clip_only(self, leaves: list[jax.Array], step: jax.Array) -> list[jax.Array]:
        """What remains to be done without a clean gradient."""
        parts = self._parts(leaves)
        order = np.argsort([i for part in parts for i in part])
        result = []
        for part in parts:
            own = _take(leaves, part)
            groups = self._groups(own, _reduction_dtype(own))
            result += _as_leaves(self._clipped(groups, self.clip == "all", step), own)
        return _take(result, order)

    def _parts(self, *gradients: list[jax.Array]) -> list[list[int]]:
        """The indices of leaves that are decided together.

        All of them, but within `shard_map` those that differ between devices apart from those that
        do not: what is computed from both would count as different.
        """
        parts: dict[Any, list[int]] = {}
        for i, leaves in enumerate(zip(*gradients, strict=True)):
            # Of a version of JAX that names it otherwise all are taken for alike.
            kind = tuple(getattr(jax.typeof(g), "manual_axis_type", None) for g in leaves)
            parts.setdefault(kind, []).append(i)
        together = self.granularity == "global" or not parts
        return [list(range(len(gradients[0])))] if together else list(parts.values())

    def _groups(self, leaves: list[jax.Array], dtype: Any) -> list[list[jax.Array]]:
        wide = [leaf.astype(dtype) for leaf in leaves]
        return [wide] if self.granularity == "global" and wide else [[leaf] for leaf in wide]

    def _clean_weight(self, cosine: jax.Array) -> jax.Array:
        if self._by_cosine:
            return cosine
        tau = 0.5 if isinstance(self.interpolation, str) else self.interpolation
        return jnp.full_like(cosine, 1 - tau)

    def _clipped(
        self, groups: list[list[jax.Array]], selected: jax.Array | bool, step: jax.Array
    ) -> list[list[jax.Array]]:
        if selected is False or self.first_clipped is None or self.clip_norm is None:
            return groups
        norm = _Scaled.of(groups).norm
        too_long = _is_active(self.first_clipped, step) & selected & ~(norm <= self.clip_norm)
        limit: float | jax.Array = self.clip_norm
        if _is_traced(limit):  # a schedule's, which cannot be checked; below 0 it would turn leaves
            limit = jnp.where(limit >= 0, limit, jnp.nan)
        factors = jnp.where(too_long, limit, 1) / jnp.where(too_long, norm, 1)
        return [[g * factors[i] for g in group] for i, group in enumerate(groups)]


class _Scaled(NamedTuple):
    """Groups of arrays, each divided by a number near its largest, so that squares stay in range.

    Attributes:
        groups: the divided arrays.
        scale: `[groups]`, by what they are divided; NaN, or normal, and so is its inverse.
        unit_norm: `[groups]`, their norms.
    """

    groups: list[list[jax.Array]]
    scale: jax.Array
    unit_norm: jax.Array

    @classmethod
    def of(cls, groups: list[list[jax.Array]]) -> _Scaled:
        largest = _vector([_largest_magnitude(group) for group in groups])
        tiny = jnp.finfo(largest.dtype).tiny
        scale = jnp.where(largest == 0, 1, jnp.clip(largest, tiny, 1 / tiny))
        inverse = 1 / scale
        divided = [[a * inverse[i] for a in group] for i, group in enumerate(groups)]
        return cls(divided, scale, jnp.sqrt(_inner_products(divided, divided)))

    @property
    def norm(self) -> jax.Array:
        return self.scale * self.unit_norm

    def cosine(self, other: _Scaled, dot: jax.Array) -> jax.Array:
        """`<a,b> / (|a||b| + 1e-20)`, the reference's guard, evaluated on the divided arrays."""
        norms = self.unit_norm * other.unit_norm
        guarded = norms + _COSINE_GUARD / self.scale / other.scale
        # Of a zero beside a huge gradient both are 0.
        return jnp.clip(dot / jnp.where(guarded == 0, 1, guarded), -1, 1)


def _largest_magnitude(group: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.maximum, [jnp.max(jnp.abs(a), initial=0) for a in group])


def _inner_product(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
    products = [jnp.sum(a * b) for a, b in zip(left, right, strict=True)]
    return functools.reduce(jnp.add, products)


def _inner_products(left: list[list[jax.Array]], right: list[list[jax.Array]]) -> jax.Array:
    return _vector([_inner_product(a, b) for a, b in zip(left, right, strict=True)])


def _linear_combination(
    clean_factor: jax.Array, clean: jax.Array, adversarial_factor: jax.Array, adversarial: jax.Array
) -> jax.Array:
    """The adversarial gradient itself where nothing is changed, to the last bit."""
    unchanged = (clean_factor == 0) & (adversarial_factor == 1)
    mixed = clean_factor * clean + adversarial_factor * adversarial
    return jnp.where(unchanged, adversarial, mixed)


def _vector(scalars: list[jax.Array]) -> jax.Array:
    return jnp.stack(scalars) if scalars else jnp.zeros([0])


def _take(leaves: list[jax.Array], indices: Iterable[int]) -> list[jax.Array]:
    return [leaves[i] for i in indices]


def _as_leaves(groups: list[list[jax.Array]], like: list[jax.Array]) -> list[jax.Array]:
    """Each with the dtype that it came with."""
    leaves = [leaf for group in groups for leaf in group]
    return [leaf.astype(given.dtype) for leaf, given in zip(leaves, like, strict=True)]


def _is_traced(value: object) -> bool:
    """Whether a hyperparameter is known only while the step runs, as `inject_hyperparams` makes it.

    Such a one can be computed with, but not checked.
    """
    return isinstance(value, jax.core.Tracer)


def _is_active(start: int | jax.Array | None, step: jax.Array) -> jax.Array:
    return jnp.asarray(False) if start is None else step >= start


def _reduction_dtype(arrays: list[jax.Array]) -> Any:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32) if arrays else jnp.float32
