"""Threat models: the balls around an image, intersected with the box [0, 1], that attacks search.

A threat model is a small frozen object such as `Linf(8 / 255)`. Images are float arrays
`[batch, ...]` with values in [0, 1]; every method treats the examples of a batch independently.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax.threat import Linf
    >>> images = jnp.full([2, 4, 4, 3], 0.5)
    >>> threat = Linf(8 / 255)
    >>> start = threat.random_start(jax.random.key(0), images)
    >>> bool((threat.distance(start, images) <= 8 / 255 + 1e-6).all())
    True
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from agr_jax.order_statistics import kth_smallest

_TINY = 1e-12
# Relative excess over the radius that the rounding of sums can make.
_ROUNDING = 1e-5
_KEYS = "one key or one per image"


@runtime_checkable
class ThreatModel(Protocol):
    """What an attack asks of a ball around the clean images."""

    @property
    def epsilon(self) -> float:
        """Radius, in units of the [0, 1] range."""
        ...

    def random_start(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Draws a point of the ball and the box around each image.

        Args:
            key: one JAX key, or an array with one per image (draws then do not depend on batching).
            images: `[batch, ...]` in [0, 1].
        """
        ...

    def ascent(self, gradient: jax.Array) -> jax.Array:
        """The step of unit length along which the loss rises most, per image; 0 for gradient 0."""
        ...

    def project(self, candidates: jax.Array, images: jax.Array, *, box: bool = True) -> jax.Array:
        """Maps candidates into the ball around `images` and, with `box`, into [0, 1]."""
        ...

    def distance(self, candidates: jax.Array, images: jax.Array) -> jax.Array:
        """Norm of `candidates - images` per image, `[batch]`."""
        ...


@dataclasses.dataclass(frozen=True)
class Linf:
    """Every pixel moves by at most `epsilon`."""

    epsilon: float

    def __post_init__(self) -> None:
        _check_epsilon(self)

    def random_start(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Uniform in the cube, then clipped to the box."""
        noise = per_image(
            key,
            images,
            lambda k, shape: jax.random.uniform(k, shape, images.dtype, -1, 1),
        )
        return jnp.clip(images + self.epsilon * noise, 0, 1)

    def ascent(self, gradient: jax.Array) -> jax.Array:
        """Sign of the gradient."""
        return jnp.sign(gradient)

    def project(self, candidates: jax.Array, images: jax.Array, *, box: bool = True) -> jax.Array:
        """Clips the perturbation, then the image."""
        inside = images + jnp.clip(candidates - images, -self.epsilon, self.epsilon)
        return jnp.clip(inside, 0, 1) if box else inside

    def distance(self, candidates: jax.Array, images: jax.Array) -> jax.Array:
        """Largest absolute difference."""
        return jnp.max(jnp.abs(flatten(candidates - images)), axis=1)


@dataclasses.dataclass(frozen=True)
class L2:
    """The perturbation of an image has a Euclidean norm of at most `epsilon`."""

    epsilon: float

    def __post_init__(self) -> None:
        _check_epsilon(self)

    def random_start(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Uniform in the ball, then clipped to the box."""

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            direction_key, radius_key = jax.random.split(key)
            direction = jax.random.normal(direction_key, shape, images.dtype)
            radius = jax.random.uniform(radius_key, (), images.dtype) ** (1 / math.prod(shape))
            return radius * direction / jnp.sqrt(jnp.sum(direction**2))

        return jnp.clip(images + self.epsilon * per_image(key, images, draw), 0, 1)

    def ascent(self, gradient: jax.Array) -> jax.Array:
        """Gradient over its Euclidean norm, however short it is."""
        unit = scaled(gradient)
        return unit / jnp.maximum(expand(_norm2(unit), gradient), 1)

    def project(self, candidates: jax.Array, images: jax.Array, *, box: bool = True) -> jax.Array:
        """Scales the perturbation back to the ball, then clips the image to the box.

        Clipping moves every pixel towards the image, so the result stays in the ball.
        """
        perturbation = candidates - images
        norm = expand(_norm2(perturbation), perturbation)
        factor = jnp.where(norm > self.epsilon, self.epsilon / jnp.maximum(norm, _TINY), 1)
        inside = images + perturbation * factor
        return jnp.clip(inside, 0, 1) if box else inside

    def distance(self, candidates: jax.Array, images: jax.Array) -> jax.Array:
        """Euclidean norm of the difference."""
        return _norm2(candidates - images)


@dataclasses.dataclass(frozen=True)
class L1:
    """The absolute values of an image's perturbation sum to at most `epsilon`.

    Attributes:
        epsilon: radius.
        sparsity: share of the pixels that one step leaves alone, in [0, 1): the sign of the
            largest `1 - sparsity` of the gradient (SLIDE; Tramer and Boneh, NeurIPS 2019).
            `None` steps along the dense gradient over its L1 norm, which is a far weaker attack.
    """

    epsilon: float
    sparsity: float | None = 0.99

    def __post_init__(self) -> None:
        _check_epsilon(self)
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"L1.sparsity must lie in [0, 1) or be None, got {self.sparsity}")

    def random_start(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Uniform in the ball, then projected into ball and box."""

        def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            value_key, radius_key = jax.random.split(key)
            direction = jax.random.laplace(value_key, shape, images.dtype)
            radius = jax.random.uniform(radius_key, (), images.dtype) ** (1 / math.prod(shape))
            return radius * direction / jnp.sum(jnp.abs(direction))

        return self.project(images + self.epsilon * per_image(key, images, draw), images)

    def ascent(self, gradient: jax.Array) -> jax.Array:
        """Sign of the largest entries, or the dense gradient, over its L1 norm."""
        if self.sparsity is None:
            direction = scaled(gradient)
        else:
            magnitude = jnp.abs(flatten(gradient))
            kept = max(1, round((1 - self.sparsity) * magnitude.shape[1]))
            threshold = kth_smallest(magnitude, magnitude.shape[1] - kept)
            large = jnp.abs(gradient) >= expand(threshold, gradient)
            direction = jnp.where(large, jnp.sign(gradient), 0)
        # Entries are at most 1 and the largest is: the sum is 0 for a zero gradient alone.
        return direction / jnp.maximum(expand(_norm1(direction), gradient), 1)

    def project(self, candidates: jax.Array, images: jax.Array, *, box: bool = True) -> jax.Array:
        """Nearest point, in the Euclidean norm, of the ball (and the box)."""
        wanted = flatten(candidates - images)
        magnitude = jnp.abs(wanted)
        flat_images = flatten(images)
        room = magnitude
        if box:
            room = jnp.minimum(room, jnp.where(wanted > 0, 1 - flat_images, flat_images))
        shrunk = _shrink_to_l1_norm(magnitude, room, self.epsilon)
        inside = flat_images + jnp.sign(wanted) * shrunk
        # The room is a difference of floats: the sum may leave the box by a rounding.
        inside = jnp.clip(inside, 0, 1) if box else inside
        return inside.reshape(images.shape)

    def distance(self, candidates: jax.Array, images: jax.Array) -> jax.Array:
        """Sum of absolute differences."""
        return _norm1(candidates - images)


def _shrink_to_l1_norm(magnitude: jax.Array, room: jax.Array, epsilon: float) -> jax.Array:
    """`min(max(magnitude - level, 0), room)` with the least level >= 0 whose sum is <= epsilon.

    The sum falls with the level, piecewise linearly: Newton's method, which bisects where it would
    leave the interval that is left, finds the piece, and one division the level within it.
    """

    def shrink(level: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.maximum(magnitude - level[:, None], 0), room)

    def narrow(carry: Any) -> Any:
        count, low, high, level, _ = carry
        excess = shrink(level).sum(1) - epsilon
        low, high = jnp.where(excess > 0, level, low), jnp.where(excess > 0, high, level)
        left = magnitude - level[:, None]
        moving = ((left > 0) & (left < room)).sum(1)
        newton = level + excess / jnp.maximum(moving, 1)
        inside = (moving > 0) & (newton > low) & (newton < high)
        following = jnp.where(inside, newton, 0.5 * (low + high))
        settled = jnp.abs(following - level) <= 2 * jnp.finfo(level.dtype).eps * level
        return count + 1, low, high, jnp.where(settled, level, following), settled

    # Bisection alone would need as many steps as the mantissa has bits.
    most = jnp.finfo(magnitude.dtype).nmant + 2
    highest = magnitude.max(1)
    whole = room.sum(1) <= epsilon
    zero = jnp.zeros_like(highest)
    start = (jnp.int32(0), zero, highest, zero, whole)

    def unsettled(carry: Any) -> jax.Array:
        return (carry[0] < most) & ~(carry[4] | whole).all()

    _, low, high, level, _ = jax.lax.while_loop(unsettled, narrow, start)
    moving = (magnitude > level[:, None]) & (magnitude - level[:, None] < room)
    count = moving.sum(1)
    above = jnp.where(moving, magnitude, jnp.where(magnitude > level[:, None], room, 0))
    exact = (above.sum(1) - epsilon) / jnp.maximum(count, 1)
    level = jnp.where(count > 0, jnp.clip(exact, low, high), level)
    return shrink(jnp.where(whole, 0, level))


def image_keys(key: jax.Array, batch_size: int) -> jax.Array:
    """One typed key per image, from one key, or from an array of them.

    Keys of other kinds than JAX's default, Threefry, become such keys: those kinds (`rbg`,
    `unsafe_rbg`) draw other numbers for a batch than for each of its images.

    Raises:
        ValueError: if it is no key, or there are several keys, but not one per image.
    """
    key = typed_key(key)
    if key.shape not in ((), (batch_size,)):
        raise ValueError(f"key must be {_KEYS} ({batch_size}), got {key.shape}")
    key = _threefry(key)
    return jax.random.split(key, batch_size) if key.ndim == 0 else key


def typed_key(key: Any) -> jax.Array:
    """A key as a typed one, which it may be already.

    Raises:
        ValueError: if it is no key.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return key
    # `jax.random.PRNGKey` gives its words, two or four, as integers.
    if dtype != jnp.uint32 or key.ndim < 1 or key.shape[-1] not in (2, 4):
        shape = "" if dtype is None else f" of dtype {dtype} and shape {key.shape}"
        raise ValueError(
            f"key must be {_KEYS}, such as jax.random.key(0), got {type(key).__name__}{shape}"
        )
    kind = {2: "threefry2x32", 4: "rbg"}[key.shape[-1]]
    return jax.random.wrap_key_data(jnp.asarray(key), impl=kind)


def _threefry(key: jax.Array) -> jax.Array:
    words = jax.random.key_data(key)
    if words.shape[-1] == 2:
        return key

    def of_words(words: jax.Array) -> jax.Array:
        first = jax.random.wrap_key_data(words[:2], impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(first, words[2]), words[3])

    return of_words(words) if key.ndim == 0 else jax.vmap(of_words)(words)


def gaussian_noise(key: jax.Array, images: jax.Array) -> jax.Array:
    """Standard normal noise for each image; `key` is one key, or one per image."""
    return per_image(key, images, lambda k, shape: jax.random.normal(k, shape, images.dtype))


NORMS: dict[str, type[Linf | L2 | L1]] = {"linf": Linf, "l2": L2, "l1": L1}
"""The balls by the names that configs and tables use."""


def per_image(
    key: jax.Array,
    images: jax.Array,
    draw: Callable[[jax.Array, tuple[int, ...]], jax.Array],
) -> jax.Array:
    """`draw(key, shape of an image)` for every image, with a key of its own."""
    keys = image_keys(key, images.shape[0])
    return jax.vmap(lambda k: draw(k, images.shape[1:]))(keys)


def check_threat(field: str, threat: Any) -> None:
    """Refuses what is no threat model, such as a bare radius.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(threat, ThreatModel):
        raise ValueError(f"{field} must be a threat model such as Linf(8 / 255), got {threat!r}")


def check_norm_ball(field: str, threat: Any) -> None:
    """Refuses a ball of one's own where an attack has the mathematics of three norms alone.

    Raises:
        ValueError: naming the field. A subclass is refused too: its ball may be another one.
    """
    if type(threat) not in NORMS.values():
        names = [norm.__name__ for norm in NORMS.values()]
        raise ValueError(f"{field} must be {', '.join(names[:-1])} or {names[-1]}, got {threat!r}")


def covers_the_box(threat: Any, pixels: int) -> bool:
    """Whether a ball holds every image of so many pixels, whatever its centre."""
    reach = {Linf: 1.0, L2: math.sqrt(pixels), L1: float(pixels)}.get(type(threat), math.inf)
    known = not isinstance(threat.epsilon, jax.core.Tracer)
    return known and bool(threat.epsilon >= reach)


def is_allowed(threat: ThreatModel, images: jax.Array, points: jax.Array) -> jax.Array:
    """Which points lie in the ball and the box, up to rounding, `[batch]`.

    A ball of one's own may be more than its distance says: its projection must leave them.
    """
    flat = flatten(points)
    in_box = (flat.min(1) >= 0) & (flat.max(1) <= 1)
    most = threat.epsilon * (1 + _ROUNDING) + _rounding(threat, flat)
    allowed = in_box & (threat.distance(points, images) <= most)
    if type(threat) in NORMS.values():
        return allowed
    moved = jnp.abs(flatten(threat.project(points, images)) - flat).max(1)
    return allowed & (moved <= _ROUNDING)


def _rounding(threat: ThreatModel, flat: jax.Array) -> float:
    """Excess over the radius that the rounding of each pixel, half a unit in its last place, makes.

    It matters for radii as small as 0.003.
    """
    pixels = flat.shape[1]
    unit = float(jnp.finfo(flat.dtype).eps) / 2
    if isinstance(threat, Linf):
        return unit
    return unit * (pixels**0.5 if isinstance(threat, L2) else pixels)


def _check_epsilon(threat: Linf | L2 | L1) -> None:
    if isinstance(threat.epsilon, jax.core.Tracer):
        return  # a radius that is an argument of the caller's own `jit`
    if not (threat.epsilon >= 0 and math.isfinite(threat.epsilon)):
        name = type(threat).__name__
        raise ValueError(f"{name}.epsilon must be a finite number >= 0, got {threat.epsilon}")
    # A NumPy scalar would widen narrower images.
    object.__setattr__(threat, "epsilon", float(threat.epsilon))


def flatten(images: jax.Array) -> jax.Array:
    """`[batch, ...]` as `[batch, pixels]`."""
    return images.reshape(images.shape[0], -1)


def expand(per_image: jax.Array, like: jax.Array) -> jax.Array:
    """One value per image, `[batch]`, with as many axes as `like`."""
    return per_image.reshape(-1, *(1 for _ in like.shape[1:]))


def scaled(gradient: jax.Array) -> jax.Array:
    """Each image's gradient over its largest entry, so that no square or sum rounds to 0."""
    largest = expand(jnp.abs(flatten(gradient)).max(1), gradient)
    return gradient / jnp.where(largest > 0, largest, 1)


def _norm1(array: jax.Array) -> jax.Array:
    return jnp.sum(jnp.abs(flatten(array)), axis=1)


def _norm2(array: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(flatten(array) ** 2, axis=1))
