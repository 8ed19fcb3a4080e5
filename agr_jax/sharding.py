"""Devices, and how arrays are placed on them: data parallelism over one mesh axis."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from agr_jax.errors import ConfigError

DATA_AXIS = "data"
# How an argument is placed: split along its first axis, or whole on each device.
SHARDED, REPLICATED = PartitionSpec(DATA_AXIS), PartitionSpec()


def prepare_backend(*, deterministic: bool) -> None:
    """Settings that must be made before JAX starts its backend.

    Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, by default in the user's cache
    folder, so that the next start does not compile again.

    Args:
        deterministic: make GPU kernels give the same bits every time (slower).
    """
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "agr_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis over the given devices, by default all of all processes."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices
    )


def as_data_mesh(on: Mesh | Sequence[jax.Device]) -> Mesh:
    """The mesh of one axis that this library splits batches over, on a caller's own devices.

    Rows are all that is split here, so of a mesh nothing matters but its devices: names, number
    and types of its axes may be any.

    Args:
        on: a `jax.sharding.Mesh`, or a list, tuple or array of devices.

    Returns:
        A mesh of the axis `"data"` over the same devices in the same order.

    Raises:
        ConfigError: if `on` is something else (a mesh without devices too), or has no devices or
            one of them twice.

    Example:
        >>> import jax
        >>> as_data_mesh(jax.devices()[:1]).axis_names
        ('data',)
    """
    given = on.devices if isinstance(on, Mesh) else on
    takes = "on: must be a jax.sharding.Mesh or a list of devices, as jax.devices()"
    if not isinstance(given, list | tuple | np.ndarray):
        got = f"one device, {on}: write [device]" if isinstance(on, jax.Device) else repr(on)
        raise ConfigError(f"{takes}; got {got}")
    devices = list(np.asarray(given, dtype=object).ravel())
    if not devices:
        raise ConfigError(f"{takes}; got none")
    for device in devices:
        if not isinstance(device, jax.Device):
            raise ConfigError(f"{takes}; got {device!r} among the devices")
    if len(set(devices)) < len(devices):
        raise ConfigError(f"on: every device must be there once, got {devices}")
    # Not `jax.make_mesh`, which may put the devices in another order.
    return Mesh(np.array(devices, dtype=object), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, REPLICATED)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split over the devices."""
    return NamedSharding(mesh, SHARDED)


def put(tree: Any, where: NamedSharding) -> Any:
    """Arrays of the host, the same in every process, on the devices; typed keys too.

    No process sends anything: each takes what its devices hold of its own copy. (With several
    processes `jax.device_put` compares the copies, at every call, by gathering them all.)

    Args:
        tree: pytree of arrays, or of keys.
        where: `replicated` or `batch_sharding` of a mesh.
    """
    if where.is_fully_addressable:
        return jax.device_put(tree, where)
    return jax.tree.map(lambda array: _put(array, where), tree)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    if isinstance(array, jax.Array):
        if not array.is_fully_addressable:  # on all devices already
            return _placer(where)(array)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            data = _put(jax.random.key_data(array), where)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


@functools.cache
def _placer(where: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=where)


def put_rows(
    load: Callable[[slice], Sequence[np.ndarray]], count: int, mesh: Mesh
) -> list[jax.Array]:
    """Arrays of rows, split over the devices, of which each process loads its own rows alone.

    Args:
        load: gives some rows of each array; called once for the rows of each device.
        count: of all rows, a multiple of the number of devices.
        mesh: the devices.
    """
    where = batch_sharding(mesh)
    parts: list[list[jax.Array]] = []
    for device, index in where.addressable_devices_indices_map((count,)).items():
        assert index is not None
        parts.append([jax.device_put(part, device) for part in load(index[0])])
    return [
        jax.make_array_from_single_device_arrays((count, *pieces[0].shape[1:]), where, list(pieces))
        for pieces in zip(*parts, strict=True)
    ]


def one_for_each_device(value: int, mesh: Mesh) -> jax.Array:
    """`[devices]` int32, split over the devices: this process's value on each of its own."""
    values = np.full(mesh.size, value, np.int32)
    (array,) = put_rows(lambda rows: [values[rows]], mesh.size, mesh)
    return array


def get(tree: Any) -> Any:
    """Whole arrays on the host, in every process; gathered where they lie on several.

    Args:
        tree: pytree of arrays; what is small, such as a verdict for each image.
    """

    def whole(array: Any) -> np.ndarray:
        if isinstance(array, jax.Array) and not (
            array.is_fully_addressable or array.is_fully_replicated
        ):
            return np.asarray(multihost_utils.process_allgather(array, tiled=True))
        return np.asarray(array)

    return jax.tree.map(whole, tree)


def shareable(count: int, mesh: Mesh | None) -> int:
    """So many rows, or a few more, so that the devices can share them evenly."""
    return count if mesh is None else count + -count % mesh.size


def filled_up(rows: np.ndarray, count: int, mesh: Mesh | None) -> np.ndarray:
    """Rows, and the last one again until there are `shareable(count, mesh)`."""
    return np.concatenate([rows, np.repeat(rows[-1:], shareable(count, mesh) - len(rows))])


def per_device(
    function: Callable[..., Any], mesh: Mesh | None, arguments: Sequence[PartitionSpec]
) -> Callable[..., Any]:
    """The function on each device's rows alone: devices do not wait for each other.

    Args:
        function: treats every row by itself; all that it returns has rows.
        mesh: the devices; `None` leaves the function as it is.
        arguments: `SHARDED` or `REPLICATED` for each of its arguments, which are pytrees.
    """
    if mesh is None:
        return function
    # Its loops start from constants, which the check takes for the same value on each device.
    return jax.shard_map(
        function, mesh=mesh, in_specs=tuple(arguments), out_specs=SHARDED, check_vma=False
    )


def check_divisible(batch_size: int, mesh: Mesh, field: str, parts: int = 1) -> None:
    """Refuses a batch that the devices cannot share evenly, in each of its parts.

    Raises:
        ConfigError: naming the field, the batch size and the number of devices.
    """
    if batch_size % (mesh.size * parts):
        in_parts = f", in {parts} parts (config.accumulate)" if parts > 1 else ""
        raise ConfigError(
            f"{field}: {batch_size} images cannot be shared evenly by {mesh.size} devices"
            f"{in_parts}; use a multiple of {mesh.size * parts}"
        )
