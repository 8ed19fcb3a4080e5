"""Random crop, flip and cutout of uint8 image batches, on the device.

Every image draws from its own key, folded from the batch's key and the image's position, so that
the result does not depend on how the batch is sharded or on how long it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from agr_jax.errors import DataError
from agr_jax.ranges import Range, check_ranges

CutoutKind = Literal["devries", "official", "none"]


def random_crop(key: jax.Array, images: jax.Array, padding: int) -> jax.Array:
    """Pads with zeros by `padding` on each side and crops back at a uniform offset per image.

    Args:
        key: a random key.
        images: uint8 [B, H, W, C].
        padding: >= 0; each of the (2 padding + 1)^2 offsets is equally likely.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        DataError: images of another dtype or rank.
    """
    _check(images)
    shape = images.shape[1:]

    def crop(image_key: jax.Array, image: jax.Array) -> jax.Array:
        top, left = jax.random.randint(image_key, (2,), 0, 2 * padding + 1, jnp.int32)
        return jax.lax.dynamic_slice(image, (top, left, jnp.zeros_like(top)), shape)

    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return _for_each_image(crop, key, padded)


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
        key: a random key.
        images: uint8 [B, H, W, C].

    Returns:
        uint8 [B, H, W, C].

    Raises:
        DataError: images of another dtype or rank.
    """
    _check(images)

    def flip(image_key: jax.Array, image: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(image_key), image[:, ::-1], image)

    return _for_each_image(flip, key, images)


def cutout(key: jax.Array, images: jax.Array, size: int = 16) -> jax.Array:
    """Zeroes a size x size square in every image (DeVries and Taylor, 2017).

    The square is centred at a uniformly drawn pixel (for an even size, on its upper left corner)
    and clipped at the border.

    Args:
        key: a random key.
        images: uint8 [B, H, W, C].
        size: side of the square in pixels, >= 1.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        DataError: images of another dtype or rank.
    """
    _check(images)
    height, width = images.shape[1:3]

    def cut(image_key: jax.Array, image: jax.Array) -> jax.Array:
        row_key, column_key = jax.random.split(image_key)
        top = jax.random.randint(row_key, (), 0, height, jnp.int32) - size // 2
        left = jax.random.randint(column_key, (), 0, width, jnp.int32) - size // 2
        box = _box(image.shape, top, left, jnp.asarray(size), jnp.asarray(size))
        return jnp.where(box, jnp.zeros_like(image), image)

    return _for_each_image(cut, key, images)


def official_cutout(key: jax.Array, images: jax.Array) -> jax.Array:
    """Fills a random box with red in half of the images: the cutout of the official AGR code.

    With probability 1/2: area fraction U(0.02, 0.4), height/width U(0.4, 2.5), a uniform position
    inside the image, filled with (v, 0, 0) for one integer v of U{0..255}. (torchtoolbox's
    `Cutout`, where Pillow takes the integer for a packed colour.)

    Args:
        key: a random key.
        images: uint8 [B, H, W, 3].

    Returns:
        uint8 [B, H, W, 3].

    Raises:
        DataError: images of another dtype or rank, or without 3 channels.
    """
    _check(images)
    height, width, channels = images.shape[1:]
    if channels != 3:
        raise DataError(f"the official cutout is defined for 3 channels, found {channels}")

    def cut(image_key: jax.Array, image: jax.Array) -> jax.Array:
        apply_key, area_key, aspect_key, row_key, column_key, value_key = jax.random.split(
            image_key, 6
        )
        area = jax.random.uniform(area_key, (), jnp.float32, 0.02, 0.4) * (height * width)
        aspect = jax.random.uniform(aspect_key, (), jnp.float32, 0.4, 2.5)
        # The minimum guards oblong images and the rounding of float32.
        box_height = jnp.minimum(jnp.sqrt(area * aspect).astype(jnp.int32), height)
        box_width = jnp.minimum(jnp.sqrt(area / aspect).astype(jnp.int32), width)
        top = jax.random.randint(row_key, (), 0, height - box_height + 1, jnp.int32)
        left = jax.random.randint(column_key, (), 0, width - box_width + 1, jnp.int32)
        red = jax.random.randint(value_key, (), 0, 256, jnp.int32).astype(jnp.uint8)
        fill = jnp.zeros_like(image).at[..., 0].set(red)
        box = _box(image.shape, top, left, box_height, box_width)
        return jnp.where(box & jax.random.bernoulli(apply_key), fill, image)

    return _for_each_image(cut, key, images)


def to_unit_range(images: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Converts uint8 images to images / 255 in [0, 1], correctly rounded in the given dtype.

    Args:
        images: uint8, any shape.
        dtype: a float dtype.

    Returns:
        Array of that shape and dtype, bit for bit NumPy's division, also inside jit.

    Raises:
        DataError: images of another dtype.
    """
    if images.dtype != jnp.uint8:
        raise DataError(f"expected uint8 images, found {images.dtype}")
    # Inside jit, XLA turns `/ 255` into a product with a rounded 1/255, which is one bit off for
    # half of the values. Here `high` is so short that its products are exact, and only the sum is
    # rounded.
    wide = jnp.promote_types(dtype, jnp.float32)
    scale = 2 ** jnp.finfo(wide).nmant
    high = Fraction(scale // 255, scale)
    low = Fraction(1, 255) - high
    pixels = images.astype(wide)
    return (pixels * float(high) + pixels * float(low)).astype(dtype)


@dataclass(frozen=True)
class Augmentation:
    """Crop, then flip, then cutout; hashable, so that it can be a static argument of jit.

    Switching one of them off does not change the draws of the others.

    Attributes:
        crop_padding: zeros around the image before the random crop; 0 for no crop.
        flip: mirror half of the images.
        cutout: "devries" (`cutout`), "official" (`official_cutout`) or "none".
        cutout_size: side of the "devries" square in pixels.

    Raises:
        ValueError: a value out of range.
    """

    crop_padding: int = 4
    flip: bool = True
    cutout: CutoutKind = "devries"
    cutout_size: int = 16

    def __post_init__(self) -> None:
        check_ranges(self, crop_padding=Range(0), cutout_size=Range(1))
        if self.cutout not in ("devries", "official", "none"):
            raise DataError(f"cutout must be devries, official or none, got {self.cutout!r}")

    def __call__(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Augments a batch.

        Args:
            key: a random key.
            images: uint8 [B, H, W, C].

        Returns:
            uint8 [B, H, W, C].

        Raises:
            DataError: images of another dtype or rank, or not fit for the official cutout.
        """
        crop_key, flip_key, cutout_key = jax.random.split(key, 3)
        _check(images)
        if self.crop_padding:
            images = random_crop(crop_key, images, self.crop_padding)
        if self.flip:
            images = random_flip(flip_key, images)
        if self.cutout == "devries":
            images = cutout(cutout_key, images, self.cutout_size)
        elif self.cutout == "official":
            images = official_cutout(cutout_key, images)
        return images


def _check(images: jax.Array) -> None:
    if images.dtype != jnp.uint8 or images.ndim != 4:
        raise DataError(f"expected uint8 images [B, H, W, C], found {images.dtype} {images.shape}")


def _for_each_image(
    transform: Callable[[jax.Array, jax.Array], jax.Array], key: jax.Array, images: jax.Array
) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(len(images)))
    return jax.vmap(transform)(keys, images)


def _box(
    shape: tuple[int, ...], top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array
) -> jax.Array:
    """Mask of a box, bool [H, W, C]; what lies outside the image is clipped."""
    rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    in_rows = (rows >= top) & (rows < top + height)
    return in_rows & (columns >= left) & (columns < left + width)
