"""Files of named tensors, `.safetensors` or `.npz`, with what they say of their network."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from agr_jax.errors import CheckpointError
from agr_jax.files import write_atomically

FORMAT_VERSION = 1
"""Version of the metadata in a file, raised when an older library could no longer read it."""

COUNTER = "num_batches_tracked"
"""PyTorch's count of BatchNorm's batches, an integer, which is written and never read."""

_SAFETENSORS_KEY, _NPZ_KEY = "agr_jax", "__metadata__"
# NumPy's, and bfloat16, which it knows of since JAX is imported.
_SAFETENSORS_FLOATS = ("BF16", "F16", "F32", "F64")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")


@dataclasses.dataclass(frozen=True)
class About:
    """What a file's tensors do not say, and what they must agree with.

    Attributes:
        name: of the network, as `agr_jax.models.create` takes it.
        width: channels of its first convolution.
        num_classes: number of logits.
        mean: input mean per channel, or one for all.
        std: input standard deviation, likewise.
    """

    name: str
    width: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read(path: Path) -> tuple[dict[str, np.ndarray], About | None]:
    """A file's tensors, without the counters of batches, and its metadata, if they are ours.

    Raises:
        CheckpointError: if the file is missing, damaged, pickled or of an unknown kind, or holds
            tensors that are no floats.
    """
    from_file = _read_safetensors if _suffix(path, writing=False) == ".safetensors" else _read_npz
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}")
    tensors, metadata = from_file(path)
    return tensors, None if metadata is None else _about(path, metadata)


def check_writing(path: Path) -> None:
    """Refuses a path that cannot be written for its suffix.

    Raises:
        CheckpointError: if the suffix is unknown, or its package is missing.
    """
    if _suffix(path, writing=True) == ".safetensors":
        _safetensors(path)


def write(path: Path, tensors: Mapping[str, np.ndarray], about: About) -> None:
    """Writes tensors and metadata, beside their place first, so that no file is ever half there.

    Raises:
        CheckpointError: if the suffix is unknown or the file cannot be written.
    """
    metadata = json.dumps({"format_version": FORMAT_VERSION, **dataclasses.asdict(about)})
    if _suffix(path, writing=True) == ".safetensors":
        content = _safetensors(path).save(dict(tensors), metadata={_SAFETENSORS_KEY: metadata})
    else:
        buffer = io.BytesIO()
        np.savez(buffer, **{_NPZ_KEY: np.frombuffer(metadata.encode(), np.uint8), **tensors})  # type: ignore[arg-type]
        content = buffer.getvalue()
    try:
        write_atomically(path, content)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


def _suffix(path: Path, *, writing: bool) -> str:
    suffix = path.suffix.lower()
    if suffix in (".safetensors", ".npz"):
        return suffix
    if suffix not in _PICKLES:
        raise CheckpointError(f"{path}: unknown suffix {suffix!r}; use '.safetensors' or '.npz'")
    new = str(path.with_suffix(".safetensors"))
    if writing:
        raise CheckpointError(
            f"{path}: no pickled file is written; save to {new!r}, and in PyTorch call "
            f"model.load_state_dict(safetensors.torch.load_file({new!r}))"
        )
    raise CheckpointError(
        f"{path}: a pickled file can run any program and is never read; convert it once, where "
        "PyTorch is (`import safetensors.torch, torch`):\n"
        f"    state = torch.load({str(path)!r}, map_location='cpu', weights_only=True)\n"
        "    state = state.get('state_dict', state)\n"
        "    safetensors.torch.save_file("
        f"{{name: value.contiguous() for name, value in state.items()}}, {new!r})"
    )


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise CheckpointError(
            f"{path}: '.safetensors' needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.numpy


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], str | bytes | None]:
    _safetensors(path)
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                if tensor.endswith(COUNTER):
                    continue
                dtype = file.get_slice(tensor).get_dtype()
                if dtype not in _SAFETENSORS_FLOATS:
                    raise CheckpointError(
                        f"{path}: {tensor!r} is {dtype}, expected one of "
                        f"{', '.join(_SAFETENSORS_FLOATS)}; in PyTorch, save value.float()"
                    )
                tensors[tensor] = file.get_tensor(tensor)
            return tensors, (file.metadata() or {}).get(_SAFETENSORS_KEY)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from error


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], str | bytes | None]:
    try:
        with zipfile.ZipFile(path):  # np.load would try other formats
            pass
        with np.load(path, allow_pickle=False) as file:
            tensors = {tensor: file[tensor] for tensor in file if not tensor.endswith(COUNTER)}
            metadata = tensors.pop(_NPZ_KEY, None)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged, or not an npz file ({error})") from error
    for tensor, value in tensors.items():
        # Members that are no arrays, as in a renamed .pt file, come as bytes.
        dtype = getattr(value, "dtype", "not an array")
        if dtype not in (np.float16, np.float32, np.float64):
            # NumPy writes bfloat16 as two bytes without a name.
            kept = "; npz does not keep bfloat16: save it as safetensors" if dtype == "V2" else ""
            raise CheckpointError(
                f"{path}: {tensor!r} is {dtype}, expected float16, float32 or float64{kept}"
            )
    return tensors, None if metadata is None else bytes(metadata)


def _about(path: Path, metadata: str | bytes) -> About:
    """Parses what `save_torch_weights` wrote."""
    try:
        values = json.loads(metadata)
        version = values.pop("format_version")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: written by a later agr_jax (format {version}, this one reads "
                f"{FORMAT_VERSION}); update agr_jax"
            )
        for name in ("mean", "std"):
            values[name] = tuple(float(value) for value in values[name])
        return About(**values)
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: its agr_jax metadata are damaged ({error})") from error
