"""Image files to uint8 arrays of one size, many at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from agr_jax.errors import DataError

Resize = Literal["crop", "stretch"]
FORMATS = ("JPEG", "PNG", "WEBP")
_IMAGES_PER_TASK = 128
# A small file may declare a gigantic image: 64 million pixels are 192 MB.
_MOST_PIXELS = 64_000_000
_PNG_BIT_DEPTH = 24  # position in the file: signature, chunk header, width, height
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def decode_all(
    names: Sequence[str],
    read: Callable[[str], bytes],
    images: np.ndarray,
    *,
    source: str,
    native_size: int | None = None,
    resize: Resize = "stretch",
) -> None:
    """Decodes files into the rows of an array; threads, because decoders leave the interpreter.

    Args:
        names: of the files.
        read: content of a file; called from threads.
        images: uint8 [N, S, S, 3], filled in place.
        source: where the files come from, for messages.
        native_size: refuse images of another size; `None` for any.
        resize: see `decode`.

    Raises:
        DataError: naming the first file that cannot be decoded.
    """

    def decode_range(start: int) -> None:
        for index in range(start, min(start + _IMAGES_PER_TASK, len(names))):
            name = names[index]
            images[index] = decode(
                read(name),
                images.shape[1],
                source=source,
                name=name,
                native_size=native_size,
                resize=resize,
            )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        tasks = [pool.submit(decode_range, i) for i in range(0, len(names), _IMAGES_PER_TASK)]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def decode(
    content: bytes,
    size: int,
    *,
    source: str,
    name: str,
    native_size: int | None = None,
    resize: Resize = "stretch",
) -> np.ndarray:
    """Decodes one JPEG, PNG or WebP file to RGB; grey is converted, transparency is dropped.

    Args:
        content: of the file.
        size: side of the result. Images of another size are resized with Pillow's antialiased
            bilinear filter (torchvision's `Resize`).
        source: where the file comes from, for messages.
        name: of the file, for messages.
        native_size: refuse images of another size; `None` for any.
        resize: `crop` keeps the proportions: the shorter side is resized and the middle kept;
            `stretch` does not.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: not such a file, damaged, or of another size than wanted; or no Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"{source}: Pillow is missing: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            width, height = opened.size
            # Checked before decoding.
            if native_size is not None and (width, height) != (native_size, native_size):
                raise _UnfitImageError(
                    f"expected {native_size}x{native_size} pixels, found {width}x{height}"
                )
            if width * height > _MOST_PIXELS:
                raise _UnfitImageError(
                    f"expected at most {_MOST_PIXELS:,} pixels, found {width}x{height}"
                )
            # Pillow reads a colour PNG of 16 bits as one of 8, without a word.
            if opened.format == "PNG" and content[_PNG_BIT_DEPTH] > 8:
                raise _UnfitImageError(
                    f"expected 8 bits a channel, found {content[_PNG_BIT_DEPTH]}"
                )
            if opened.mode not in _MODES:
                raise _UnfitImageError(
                    f"expected 8 bits a channel, found Pillow's mode {opened.mode}"
                )
            colours = opened.convert("RGBA") if opened.mode == "P" else opened
            image = colours.convert("RGB")
    except _UnfitImageError as error:
        raise DataError(f"{source}: image {name}: {error}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{source}: unreadable image {name}: expected a whole JPEG, PNG or WebP file, found "
            f"{len(content):,} bytes: {error}"
        ) from error
    if (width, height) == (size, size):
        return np.asarray(image)
    bilinear = Image.Resampling.BILINEAR
    if resize == "stretch" or width == height:
        return np.asarray(image.resize((size, size), bilinear))
    shorter = min(width, height)
    scaled = [max(size, round(side * size / shorter)) for side in (width, height)]
    image = image.resize((scaled[0], scaled[1]), bilinear)
    left, top = ((side - size) // 2 for side in scaled)
    return np.asarray(image.crop((left, top, left + size, top + size)))


class _UnfitImageError(Exception):
    """An intact image of another kind than wanted."""
