"""AutoAttack: a fixed sequence of attacks, each on the images that all before it left.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax.attacks import autoattack
    >>> from agr_jax.threat import Linf
    >>> images = jnp.stack([jnp.full([8, 8, 1], 0.45), jnp.full([8, 8, 1], 0.2)])
    >>> dark = lambda x: jnp.stack([0.5 - x.mean((1, 2, 3)), x.mean((1, 2, 3)) - 0.5,
    ...                             x[:, 0, 0, 0] - 2, x[:, 1, 1, 0] - 2], axis=1)
    >>> attack = autoattack(Linf(0.1))
    >>> result = attack.evaluate(dark, images, jnp.array([0, 0]), jax.random.key(0), progress=False)
    >>> result.robust_accuracy
    0.5
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from agr_jax.attacks._attack import LogitsFn
from agr_jax.attacks._autoattack.members import MEMBERS, Member, make_member
from agr_jax.attacks._autoattack.placed import Placed
from agr_jax.attacks._autoattack.result import AutoAttackResult
from agr_jax.attacks._autoattack.run import evaluate
from agr_jax.attacks._checks import check_inputs, warn_of_radius
from agr_jax.attacks._square import check_shape
from agr_jax.ranges import Range, check_ranges
from agr_jax.sharding import as_data_mesh
from agr_jax.threat import L1, L2, Linf, check_norm_ball, typed_key

_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "fast": ("apgd-ce", "apgd-t"),
}


@dataclasses.dataclass(frozen=True)
class AutoAttack:
    """The parameter-free ensemble that robustness is usually reported with.

    `evaluate` gives the whole result. Called as `attack(logits_fn, images, labels, key)` it returns
    the adversarial images alone. It packs the images that are left into a few fixed batch shapes
    from the host, so it is not for use inside `jit`.

    Attributes:
        threat: `Linf`, `L2` or `L1` ball.
        version: `standard` (APGD-CE, targeted APGD, targeted FAB, Square), `plus`, `rand` for
            randomised networks `logits_fn(images, key)`, `custom`, or `fast`: APGD-CE and targeted
            APGD, **which is not AutoAttack** and says so in every output.
        attacks: with `custom`, which of `MEMBERS` in which order, with the settings of `standard`.
        batch_size: images at a time; changes the speed, not the result.
        verdict_draws: with `rand`, the fresh draws of the network that each verdict takes: an image
            is robust where more than half of them are right. The published code takes one, and
            loses an image to a single unlucky draw.

    Source: Croce and Hein, ICML 2020, and the settings of the published code (of July 2024). Unlike
    there, Square draws for each image apart, and all draws depend on the key, the attack and the
    position of an image alone (but for those of a randomised network, one key for each batch).
    https://arxiv.org/abs/2003.01690
    """

    threat: Linf | L2 | L1
    version: Literal["standard", "plus", "rand", "fast", "custom"] = "standard"
    attacks: tuple[str, ...] = ()
    batch_size: int = 250
    verdict_draws: int = 20

    def __post_init__(self) -> None:
        check_norm_ball("AutoAttack.threat", self.threat)
        if self.version not in (*_VERSIONS, "custom"):
            raise ValueError(
                f"AutoAttack.version must be one of {', '.join((*_VERSIONS, 'custom'))}, got "
                f"{self.version!r}"
            )
        if (self.version == "custom") != bool(self.attacks):
            raise ValueError(
                'AutoAttack.attacks goes with version="custom", and only with it, got '
                f"{self.attacks} with {self.version!r}"
            )
        # A list would be no key of a compiled program.
        object.__setattr__(self, "attacks", tuple(self.attacks))
        unknown = [name for name in self.attacks if name not in MEMBERS]
        if unknown or len(set(self.attacks)) != len(self.attacks):
            raise ValueError(
                f"AutoAttack.attacks must be different ones of {', '.join(MEMBERS)}, got "
                f"{self.attacks}"
            )
        check_ranges(self, batch_size=Range(1), verdict_draws=Range(1))

    @property
    def title(self) -> str:
        """What a table may call it."""
        if self.version == "standard":
            return "AutoAttack"
        if self.version == "fast":
            return "APGD-CE + APGD-T (fast, not AutoAttack)"
        if self.version == "custom":
            return f"{' + '.join(self.attacks)} (custom, not AutoAttack)"
        return f"AutoAttack ({self.version})"

    @property
    def sequence(self) -> tuple[str, ...]:
        """The attacks in their order."""
        return self.attacks or _VERSIONS[self.version]

    def __call__(
        self, logits_fn: LogitsFn, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> jax.Array:
        """Returns adversarial images: fooled ones at their points, the others as they are.

        Arguments and errors as `evaluate`, which also shows the progress.
        """
        return jnp.asarray(
            self.evaluate(logits_fn, images, labels, key, progress=False).adversarial
        )

    def evaluate(
        self,
        logits_fn: LogitsFn,
        images: Any,
        labels: Any,
        key: jax.Array,
        *,
        folder: str | os.PathLike[str] | None = None,
        on: Mesh | Sequence[jax.Device] | None = None,
        progress: bool = True,
    ) -> AutoAttackResult:
        """Attacks every image until one attack succeeds or all have failed.

        Everything runs at float32's full matrix precision (float64 for float64 images).

        Args:
            logits_fn: any callable that maps images `[batch, ...]` to logits `[batch, classes]`, in
                evaluation mode; with `rand` it takes a key too. It is what it computes when it is
                passed; a second network of the same structure compiles nothing again.
            images: floats in [0, 1], `[examples, ...]` (for Square `[examples, height, width,
                channels]`).
            labels: integers `[examples]`.
            key: one JAX key, the seed of all draws.
            folder: where to keep what is done after each batch; a second call with the same
                arguments goes on from there and ends with the same result.
            on: a mesh or a list of devices that share each batch; by default the one that JAX uses.
                Each runs the network on its own part of a batch: it cannot name devices itself.
            progress: show a bar, or plain lines where there is no terminal.

        Raises:
            ValueError: if images, labels or logits have the wrong dtype, shape or range, or if the
                logits of an image depend on its batch.
            EvaluationStateError: if `folder` holds another evaluation or damaged files.

        Warns:
            EvaluationWarning: where a check finds that the result may be unreliable.
        """
        images, labels = _as_arrays(images, labels)
        if "square" in self.sequence:
            _check_layout(images.shape)
        key = typed_key(key)
        if key.ndim:
            raise ValueError(f"key must be one key, got shape {key.shape}")
        warn_of_radius(self.threat, images)
        mesh = None if on is None else as_data_mesh(on)
        with jax.default_matmul_precision("float32"):
            placed = Placed(logits_fn, images, labels, key, mesh, self)
            return evaluate(placed, self, None if folder is None else Path(folder), progress)

    def make(self, name: str, num_classes: int) -> Member:
        """One attack of the sequence, for a number of classes."""
        return make_member(name, self.threat, self.version, num_classes)


def _as_arrays(images: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    dtype = getattr(images, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"images must be floats in [0, 1], got dtype {dtype}; divide by 255")
    wide = np.float64 if dtype == np.float64 and jax.config.read("jax_enable_x64") else np.float32
    images, labels = np.asarray(images, wide), np.asarray(labels)
    check_inputs(jnp.asarray(images), labels)
    return images, labels.astype(np.int32)


def _check_layout(shape: tuple[int, ...]) -> None:
    """Refuses what Square cannot search, before the attacks that can."""
    without = (
        'without Square other layouts can be attacked too: version="custom", '
        'attacks=("apgd-ce", "apgd-t", "fab-t")'
    )
    try:
        check_shape(shape)
    except ValueError as error:
        raise ValueError(f"{error}; {without}") from error
    if shape[1] in (1, 3) and shape[2] == shape[3] > 4:
        raise ValueError(
            f"images must be [examples, height, width, channels], got shape {shape}, which "
            f"looks like channels first: images.transpose(0, 2, 3, 1); {without}"
        )
