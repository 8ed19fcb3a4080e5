"""What an evaluation has on the devices: batches of its images, and the network for them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from agr_jax import sharding
from agr_jax.attacks._attack import LogitsFn
from agr_jax.attacks._autoattack import packing
from agr_jax.attacks._autoattack.members import MEMBERS, Ensemble
from agr_jax.attacks._calling import traced_network
from agr_jax.attacks._tracing import Traced

CLEAN = 0
"""Number of the stream of random keys for what is not an attack."""


class Placed:
    """Images, labels and network, on the devices in batches of a few shapes.

    Attributes:
        images: all of them, on the host.
        labels: theirs.
        key: of the evaluation.
        mesh: the devices; `None` for the one that JAX uses.
        draws: of a randomised network that a verdict takes; 0 for one that is not.
        per_device: the mesh whose devices attack their parts of a batch alone; `None` where the
            draws of a randomised network are those of its whole batch.
        shapes: numbers of images of a batch, largest first.
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        images: np.ndarray,
        labels: np.ndarray,
        key: jax.Array,
        mesh: Mesh | None,
        ensemble: Ensemble,
    ) -> None:
        self.images, self.labels, self.key, self.mesh = images, labels, key, mesh
        is_random = ensemble.version == "rand"
        self.draws = ensemble.verdict_draws if is_random else 0
        self.per_device = None if is_random else mesh
        self.shapes = packing.batch_shapes(min(ensemble.batch_size, len(labels)))
        self._logits_fn = logits_fn
        self._differentiated = set(ensemble.sequence) != {"square"}
        self._networks: dict[int, Traced] = {}
        self._copies: dict[int, tuple[Any, Any]] = {}

    def network(self, shape: int) -> Traced:
        """The network for batches of a shape, its arrays on the devices."""
        return self._network(self.rows_of(shape))

    def network_of_device(self, shape: int) -> Traced:
        """The network for the part of a batch that one device gets."""
        devices = 1 if self.per_device is None else self.per_device.size
        return self._network(self.rows_of(shape) // devices)

    def _network(self, rows: int) -> Traced:
        if rows not in self._networks:
            images = jax.ShapeDtypeStruct((rows, *self.images.shape[1:]), self.images.dtype)
            keys = (self.key,) if self.draws else ()
            network = traced_network(self._logits_fn, images, *keys, gradient=self._differentiated)
            self._networks[rows] = self._replicated(network)
        return self._networks[rows]

    def traced_again(self, images: jax.Array) -> Traced:
        """The network as it is traced another time: its draws in Python are constants of one."""
        return traced_network(self._logits_fn, images, gradient=False)

    def _replicated(self, network: Traced) -> Traced:
        if self.mesh is None:
            return network
        for array in jax.tree.leaves(network):  # one copy for all shapes
            if id(array) not in self._copies:
                copy = sharding.put(array, sharding.replicated(self.mesh))
                self._copies[id(array)] = array, copy
        return jax.tree.map(lambda array: self._copies[id(array)][1], network)

    def batch(self, rows: np.ndarray, shape: int, stream: int) -> tuple[Any, Any, Any]:
        """Images, labels and keys of rows, filled up with the last of them."""
        rows = self.filled(rows, shape)
        keys = _keys_of_images(self.key, stream, rows)
        return self.split((self.images[rows], self.labels[rows], keys))

    def filled(self, rows: np.ndarray, shape: int) -> np.ndarray:
        """Rows, and the last one again until there are enough for a shape."""
        return sharding.filled_up(rows, shape, self.mesh)

    def rows_of(self, shape: int) -> int:
        """So many rows are on the devices for a shape.

        The shape itself does not depend on the devices: so neither does what is kept on disk.
        """
        return sharding.shareable(shape, self.mesh)

    def key_of_batch(self, rows: np.ndarray, stream: int) -> jax.Array:
        """That of its first image, for what a whole batch draws."""
        return _keys_of_images(self.key, stream, rows[:1])[0]

    def batches(self) -> Iterator[tuple[np.ndarray, int]]:
        """All rows, in batches, each with its shape."""
        return packing.pack(np.arange(len(self.labels)), self.shapes)

    def split(self, tree: Any) -> Any:
        """A pytree of rows, over the devices."""
        if self.mesh is None:
            return tree
        return sharding.put(tree, sharding.batch_sharding(self.mesh))


def stream_of(member: str) -> int:
    """Number of the stream of random keys of an attack."""
    return 1 + MEMBERS.index(member)


@jax.jit
def _keys_of_images(key: jax.Array, stream: int, rows: jax.Array) -> jax.Array:
    own = jax.random.fold_in(key, stream)
    return jax.vmap(functools.partial(jax.random.fold_in, own))(rows)
