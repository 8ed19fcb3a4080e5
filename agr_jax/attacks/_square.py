"""Square attack: random search with local changes; sees logits, never gradients."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from agr_jax import losses
from agr_jax.attacks._attack import LogitsFn
from agr_jax.attacks._calling import run
from agr_jax.attacks._checks import as_array
from agr_jax.attacks._outcome import Blind, UnitOutcome
from agr_jax.attacks._predictions import misclassified
from agr_jax.ranges import Range, check_ranges
from agr_jax.threat import L1, L2, Linf, check_norm_ball, expand

# The share of the pixels in a window halves after these queries (of 10,000): large squares find the
# region, small ones refine it.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# Queries after which the images that are left close up: each a stage as long as all before it, so
# that a batch is packed again a few times only.
_STAGES = tuple(100 * 2**power for power in range(64))
# The initial perturbation under L2 and L1 is a grid of so many tiles a side.
_TILES = 5
# Under L2 and L1 a window has this side at least, and an odd one: a pyramid needs a middle.
_LEAST_SIDE = 3
# Under L1, points stay inside of the radius by this share: sums in another order stay inside too.
_INSIDE = 1e-6
# The k-th rectangle of a pyramid adds 1 / k^power: under L1 steeper, for fewer pixels matter.
_POWER = {L2: 2, L1: 4}


@dataclasses.dataclass(frozen=True)
class Square:
    """Random search over squares (L-infinity) or pyramids (L2, L1) of falling size.

    Called as `attack(logits_fn, images, labels, key)`, under `jit` or not, with images
    `[batch, height, width, channels]`. A proposal is kept where it raises the margin or is
    misclassified, and an image is left alone as soon as it is. Positions and signs are drawn for
    each image apart.

    Attributes:
        threat: `Linf`, `L2` or `L1` ball.
        queries: proposals for each image.
        initial_share: share of the pixels in the first window.
        rescale_schedule: stretch the schedule of window sizes, which is that of 10,000 queries, to
            `queries`. AutoAttack does not.

    Source: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack
    via random search", ECCV 2020; for L1 Croce and Hein, "Mind the box", ICML 2021.
    https://arxiv.org/abs/1912.00049, https://arxiv.org/abs/2103.01208

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from agr_jax.attacks import square
        >>> from agr_jax.threat import Linf
        >>> images, labels = jnp.full([1, 4, 4, 1], 0.52), jnp.array([0])
        >>> brightness = lambda x: jnp.stack([x.mean((1, 2, 3)), jnp.full(len(x), 0.5)], 1)
        >>> attack = square(Linf(0.1), queries=50)
        >>> adversarial = attack(brightness, images, labels, jax.random.key(0))
        >>> bool(adversarial.mean() <= 0.5)
        True
    """

    threat: Linf | L2 | L1
    queries: int = 5000
    initial_share: float = 0.8
    rescale_schedule: bool = False

    def __post_init__(self) -> None:
        check_norm_ball("Square.threat", self.threat)
        check_ranges(self, queries=Range(1), initial_share=Range(0, 1, above=True))

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns adversarial images, of the shape and dtype of `images`, in the ball and the box.

        Args:
            logits_fn: any callable that maps images to logits `[batch, classes]`, in evaluation
                mode; see `PGD.__call__`.
            images: float32 or float64 in [0, 1], `[batch, height, width, channels]`.
            labels: `[batch]` integers.
            key: one JAX key, or one per image.

        Raises:
            ValueError: as `PGD.__call__`.

        Warns:
            EvaluationWarning: as `PGD.__call__`, but of gradients.
        """
        images = as_array(images)
        check_shape(images.shape)
        points: jax.Array = run(_run, self, logits_fn, images, labels, key=key, gradient=False)
        return points

    @property
    def passes(self) -> int:
        """Forward passes of one unit for one image; a gradient counts as two more."""
        return self.queries

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of queries after which images that are fooled may leave: each twice the last."""
        return (*takewhile(lambda count: count < self.queries, _STAGES), self.queries)

    def units(self, num_classes: int) -> int:
        """One: there are no restarts."""
        return 1

    def unit(
        self,
        logits_fn: LogitsFn,
        images: jax.Array,
        labels: jax.Array,
        keys: jax.Array,
        index: jax.Array | int,
    ) -> UnitOutcome:
        """All queries; see `APGD.unit`."""
        state = self.begin(logits_fn, images, labels, keys)
        state = self.advance(logits_fn, images, labels, keys, state, 0, self.queries)
        return UnitOutcome(state.points, state.fooled, Blind.nowhere(labels))

    def begin(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> SquareState:
        """The start: vertical stripes (L-infinity), or a tiling of pyramids (L2, L1)."""
        draw_keys = jax.vmap(lambda key: jax.random.fold_in(key, self.queries))(keys)
        threat = self.threat
        if isinstance(threat, Linf):
            points = jax.vmap(functools.partial(_stripes, threat))(draw_keys, images)
        else:
            tiles = jax.vmap(functools.partial(_tiling, threat))(draw_keys, images)
            points = _onto_ball(threat, tiles, images)
        logits = logits_fn(points)
        return SquareState(points, losses.margin(logits, labels), misclassified(logits, labels))

    def advance(
        self,
        logits_fn: LogitsFn,
        images: jax.Array,
        labels: jax.Array,
        keys: jax.Array,
        state: SquareState,
        first: jax.Array | int,
        last: jax.Array | int,
    ) -> SquareState:
        """Takes the queries in `[first, last)`, fewer if every image is fooled before."""
        propose = _proposals(self, images)

        def unfinished(carry: tuple[jax.Array, SquareState]) -> jax.Array:
            query, state = carry
            return (query < last) & ~state.fooled.all()

        def one(carry: tuple[jax.Array, SquareState]) -> tuple[jax.Array, SquareState]:
            query, state = carry
            points = propose(keys, query, state.points)
            logits = logits_fn(points)
            margin, wrong = losses.margin(logits, labels), misclassified(logits, labels)
            # A margin of 0 is a tie, which the prediction decides.
            better = ~state.fooled & (wrong | (margin > state.margin))
            return query + 1, SquareState(
                jnp.where(expand(better, images), points, state.points),
                jnp.where(better, margin, state.margin),
                state.fooled | (better & wrong),
            )

        return lax.while_loop(unfinished, one, (jnp.asarray(first, jnp.int32), state))[1]


class SquareState(NamedTuple):
    """Where the search is.

    Attributes:
        points: `[batch, ...]`, the best so far.
        margin: `[batch]`, theirs.
        fooled: booleans `[batch]`, whether they are misclassified.
    """

    points: jax.Array
    margin: jax.Array
    fooled: jax.Array


def _run(
    attack: Square, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, keys: jax.Array
) -> jax.Array:
    wrong = jnp.argmax(logits_fn(images), axis=1) != labels
    points = attack.unit(logits_fn, images, labels, keys, 0).points
    return lax.stop_gradient(jnp.where(expand(wrong, images), images, points))


def _proposals(
    attack: Square, images: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function from keys, query and points to the points that are tried next."""
    threat = attack.threat
    sizes, kinds = _window_sizes(attack, *images.shape[1:3])

    def keys_of(keys: jax.Array, query: jax.Array) -> jax.Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, query))(keys)

    if isinstance(threat, Linf):

        def square(keys: jax.Array, query: jax.Array, points: jax.Array) -> jax.Array:
            size = jnp.asarray(sizes)[jnp.asarray(kinds)[query]]
            move = functools.partial(_add_square, threat, size)
            return jax.vmap(move)(keys_of(keys, query), points, images)

        return square

    patterns = _patterns(threat, sizes, images)

    def pyramids(keys: jax.Array, query: jax.Array, points: jax.Array) -> jax.Array:
        kind = jnp.asarray(kinds)[query]
        move = functools.partial(_shift_mass, threat, jnp.asarray(sizes)[kind], patterns[kind])
        return _onto_ball(threat, jax.vmap(move)(keys_of(keys, query), points - images), images)

    return pyramids


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuses images that have no height and width.

    Raises:
        ValueError: naming the shape.
    """
    if len(shape) != 4:
        raise ValueError(
            f"Square needs images [batch, height, width, channels], got shape {tuple(shape)}"
        )


def _window_sizes(attack: Square, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The sides of the windows, largest first, and for each query which of them it uses."""
    sides = []
    for query in range(attack.queries):
        moment = int(query / attack.queries * 10_000) if attack.rescale_schedule else query
        share = attack.initial_share / 2 ** sum(moment > limit for limit in _HALVED_AFTER)
        side = round(math.sqrt(share * height * width))
        if isinstance(attack.threat, Linf):
            side = max(side, 1)
        else:
            side = max(side, _LEAST_SIDE)
            side += side % 2 == 0
        sides.append(min(side, height, width))
    sizes, first, phase = np.unique(sides, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.argsort(order)
    return sizes[order].astype(np.int32), rank[phase].astype(np.int32)


def _signs(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.rademacher(key, shape, dtype)


def _corner(key: jax.Array, size: jax.Array, height: int, width: int) -> jax.Array:
    """Row and column of a window; as in the published code the last one of each is never drawn."""
    room = jnp.asarray([height, width]) - size
    draw = jax.random.uniform(key, (2,)) * room.astype(jnp.float32)
    return jnp.minimum(draw.astype(jnp.int32), jnp.maximum(room - 1, 0))


def _window(corner: jax.Array, size: jax.Array, image: jax.Array) -> jax.Array:
    """1 inside the window, `[height, width, 1]`."""
    height, width, _ = image.shape
    inside_rows = _between(jnp.arange(height), corner[0], size)[:, None, None]
    inside_columns = _between(jnp.arange(width), corner[1], size)[None, :, None]
    return inside_rows & inside_columns


def _between(positions: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    return (positions >= first) & (positions < first + count)


def _stripes(threat: Linf, key: jax.Array, image: jax.Array) -> jax.Array:
    _, width, channels = image.shape
    return jnp.clip(image + threat.epsilon * _signs(key, (1, width, channels), image.dtype), 0, 1)


def _add_square(
    threat: Linf, size: jax.Array, key: jax.Array, point: jax.Array, image: jax.Array
) -> jax.Array:
    corner_key, sign_key = jax.random.split(key)
    corner = _corner(corner_key, size, *image.shape[:2])
    signs = _signs(sign_key, (1, 1, image.shape[2]), image.dtype)
    moved = point + jnp.where(_window(corner, size, image), 2 * threat.epsilon * signs, 0)
    return threat.project(moved[None], image[None])[0]


def _onto_ball(threat: L2 | L1, perturbation: jax.Array, images: jax.Array) -> jax.Array:
    """Scaled to the radius and cut by the box (L2), or projected just inside it (L1)."""
    if isinstance(threat, L1):
        inner = L1(threat.epsilon * (1 - _INSIDE))
        return inner.project(images + perturbation, images)
    length = threat.distance(images + perturbation, images)
    factor = threat.epsilon / (length + 1e-12)
    return jnp.clip(images + expand(factor, images) * perturbation, 0, 1)


def _shift_mass(
    threat: L2 | L1, size: jax.Array, patterns: jax.Array, key: jax.Array, perturbation: jax.Array
) -> jax.Array:
    """Empties one window and puts what was in it, and what the ball allows, into another.

    Args:
        threat: the ball.
        size: side of the windows.
        patterns: `[2, 2 height, 2 width]`: the pyramids, upright and transposed, with their corner
            in the middle.
        key: of this image and query.
        perturbation: `[height, width, channels]`.
    """
    height, width, channels = perturbation.shape
    corner_key, other_key, turn_key, sign_key = jax.random.split(key, 4)
    corner = _corner(corner_key, size, height, width)
    emptied = _corner(other_key, size, height, width)
    pattern = lax.dynamic_slice(
        patterns[jax.random.bernoulli(turn_key).astype(jnp.int32)],
        (height - corner[0], width - corner[1]),
        (height, width),
    )[:, :, None]
    signs = _signs(sign_key, (1, 1, channels), perturbation.dtype)
    window, other = (_window(where, size, perturbation) for where in (corner, emptied))

    inside = jnp.where(window, perturbation, 0)
    shape = signs * pattern + inside / (1e-12 + _length(threat, inside))
    shape = jnp.where(window, shape, 0)
    in_windows = _length(threat, jnp.where(window | other, perturbation, 0))
    # Each channel gets what its windows held and its share of what the ball has left.
    if isinstance(threat, L2):
        left = jnp.maximum(threat.epsilon**2 - jnp.sum(perturbation**2), 0)
        length = jnp.sqrt(left / channels + in_windows**2)
    else:
        left = jnp.maximum(threat.epsilon - jnp.sum(jnp.abs(perturbation)), 0)
        length = left + in_windows * channels
    new = shape / (1e-12 + _length(threat, shape)) * length
    return jnp.where(window, new, jnp.where(other, 0, perturbation))


def _length(threat: L2 | L1, perturbation: jax.Array) -> jax.Array:
    """Norm of each channel, `[1, 1, channels]`."""
    if isinstance(threat, L2):
        return jnp.sqrt(jnp.sum(perturbation**2, (0, 1), keepdims=True))
    return jnp.sum(jnp.abs(perturbation), (0, 1), keepdims=True)


def _patterns(threat: L2 | L1, sizes: np.ndarray, images: jax.Array) -> jax.Array:
    """The pyramids of every size, `[sizes, 2, 2 height, 2 width]`, see `_shift_mass`."""
    height, width = images.shape[1:3]
    table = np.zeros([len(sizes), 2, 2 * height, 2 * width])
    for index, size in enumerate(sizes):
        pyramid = _pyramids(threat, int(size))
        table[index, 0, height : height + size, width : width + size] = pyramid
        table[index, 1, height : height + size, width : width + size] = pyramid.T
    return jnp.asarray(table, images.dtype)


def _tiling(threat: L2 | L1, key: jax.Array, image: jax.Array) -> jax.Array:
    """Pyramids of random orientation side by side, with a random sign for each channel."""
    height, width, channels = image.shape
    side = max(height // _TILES, 1)
    margin = max((height - _TILES * side) // 2, 0)
    rows, columns = (min(n // side, (n - margin) // side) for n in (height, width))
    turn_key, sign_key = jax.random.split(key)
    turned = jax.random.bernoulli(turn_key, shape=(rows, columns, 1, 1))
    pyramid = jnp.asarray(_pyramids(threat, side), image.dtype)
    tiles = jnp.where(turned, pyramid.T[None, None], pyramid[None, None])
    signed = tiles[..., None] * _signs(sign_key, (rows, columns, 1, 1, channels), image.dtype)
    area = signed.transpose(0, 2, 1, 3, 4).reshape(rows * side, columns * side, channels)
    return lax.dynamic_update_slice(jnp.zeros_like(image), area, (margin, margin, 0))


def _pyramids(threat: L2 | L1, size: int) -> np.ndarray:
    """Two pyramids of opposite sign, one above the other, `[size, size]` of norm 1."""
    power = _POWER[type(threat)]
    upper = size // 2
    halves = [_pyramid(upper, size, power), -_pyramid(size - upper, size, power)]
    halves = [half / max(_norm(threat, half), 1e-30) for half in halves]
    both = np.concatenate(halves)
    return both / _norm(threat, both)


def _pyramid(height: int, width: int, power: int) -> np.ndarray:
    """Nested rectangles around the middle, the k-th adding `1 / k^power`."""
    values = np.zeros([height, width])
    row, column = height // 2, width // 2
    for ring in range(max(row, column) + 1):
        rows = slice(max(row - ring, 0), max(min(row + ring + 1, height), 0))
        columns = slice(max(column - ring, 0), max(min(column + ring + 1, width), 0))
        values[rows, columns] += 1 / (ring + 1) ** power
    return values


def _norm(threat: L2 | L1, values: np.ndarray) -> float:
    if isinstance(threat, L2):
        return float(np.sqrt((values**2).sum()))
    return float(np.abs(values).sum())
