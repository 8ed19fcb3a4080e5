"""Augmentation against plain NumPy, and the distributions of its draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agr_jax.data import Augmentation, to_unit_range
from agr_jax.data.augment import cutout, official_cutout, random_crop, random_flip
from agr_jax.errors import DataError


def noise(batch, height=32, width=32, channels=3, *, low=0):
    generator = np.random.default_rng(0)
    return generator.integers(low, 256, (batch, height, width, channels), np.uint8)


def chi_square_is_plausible(counts):
    """Whether counts look uniform: within 4 standard deviations of the chi-square's mean."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.size - 1
    return abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def crop_with_numpy(image, top, left, padding):
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    return padded[top : top + image.shape[0], left : left + image.shape[1]]


def observed_offsets(before, after, padding):
    """The (top, left) of a crop of one image, the only one that explains it."""
    explained = [
        (top, left)
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
        if np.array_equal(crop_with_numpy(before, top, left, padding), after)
    ]
    assert len(explained) == 1
    return explained[0]


def boxes(changed):
    """Rows and columns [B, 4] (top, bottom, left, right) of boolean boxes [B, H, W]."""
    found = []
    for mask in changed:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        found.append((rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    return np.array(found)


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (8, 6, 2), (5, 7, 1)])
def test_crop_equals_numpy_at_the_observed_offsets(height, width, padding):
    images = noise(24, height, width)
    cropped = np.asarray(random_crop(jax.random.key(1), jnp.asarray(images), padding))
    assert cropped.dtype == np.uint8
    offsets = {observed_offsets(a, b, padding) for a, b in zip(images, cropped, strict=True)}
    assert len(offsets) > 1


def test_crop_offsets_are_uniform():
    # Every pixel of a coordinate image tells its own position, so one pixel gives the offset.
    rows, columns = np.meshgrid(np.arange(1, 12), np.arange(1, 12), indexing="ij")
    image = np.stack([rows, columns], -1).astype(np.uint8)
    images = jnp.asarray(np.tile(image, (20_000, 1, 1, 1)))
    middle = np.asarray(random_crop(jax.random.key(2), images, 4))[:, 5, 5].astype(int)
    counts = np.zeros((9, 9), int)
    np.add.at(counts, (middle[:, 0] - 2, middle[:, 1] - 2), 1)
    assert counts.sum() == 20_000
    assert chi_square_is_plausible(counts)


def test_crop_without_padding_is_the_identity():
    images = noise(4)
    np.testing.assert_array_equal(random_crop(jax.random.key(0), jnp.asarray(images), 0), images)


def test_flip_mirrors_half_of_the_images():
    images = noise(4000, 4, 4)
    flipped = np.asarray(random_flip(jax.random.key(3), jnp.asarray(images)))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_cutout_equals_numpy_at_every_possible_centre(size):
    side = 9
    images = noise(3000, side, side, low=1)
    result = np.asarray(cutout(jax.random.key(4), jnp.asarray(images), size))
    # What each centre would give; size 16 hides several centres behind the same clipped square.
    masks = {}
    for row in range(side):
        for column in range(side):
            mask = np.zeros((side, side), bool)
            top, left = row - size // 2, column - size // 2
            mask[max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = True
            masks.setdefault(mask.tobytes(), []).append((row, column))
    counts = dict.fromkeys(masks, 0)
    for before, after in zip(images, result, strict=True):
        zeroed = (after == 0).all(-1)
        np.testing.assert_array_equal(after, np.where(zeroed[..., None], 0, before))
        counts[zeroed.tobytes()] += 1  # a KeyError here is a square that no centre gives
    observed = np.array([counts[m] for m in masks])
    expected = 3000 * np.array([len(masks[m]) for m in masks]) / side**2
    degrees = len(masks) - 1
    if degrees:
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert abs(statistic - degrees) < 4 * np.sqrt(2 * degrees)


def test_cutout_16_of_32_is_a_full_square_inside():
    images = noise(500, low=1)
    zeroed = (np.asarray(cutout(jax.random.key(5), jnp.asarray(images))) == 0).all(-1)
    top, bottom, left, right = boxes(zeroed).T
    inside = (top > 0) & (bottom < 32) & (left > 0) & (right < 32)
    assert inside.any()
    assert (bottom - top)[inside].min() == (right - left)[inside].max() == 16
    # A centre in the corner leaves at least 8 x 8.
    assert (bottom - top).min() >= 8
    assert zeroed.any((1, 2)).all()


@pytest.mark.slow
def test_official_cutout_distribution():
    images = noise(6000, low=1)
    images[..., 1:] = 200  # a filled pixel is then one whose green is 0
    result = np.asarray(official_cutout(jax.random.key(6), jnp.asarray(images)))
    filled = result[..., 1] == 0
    np.testing.assert_array_equal(np.where(filled[..., None], images, result), images)
    applied = filled.any((1, 2))
    assert abs(applied.mean() - 0.5) < 4 * 0.5 / np.sqrt(6000)

    top, bottom, left, right = boxes(filled[applied]).T
    height, width = bottom - top, right - left
    # Floors take less than one pixel from each side.
    assert (height * width / 1024).max() <= 0.4
    assert ((height + 1) * (width + 1) / 1024).min() >= 0.02
    assert ((height + 1) / width).min() >= 0.4
    assert (height / (width + 1)).max() <= 2.5
    assert (height.min() < 5, height.max() > 28) == (True, True)
    # E[area] = 0.21 of the image, E[h/w] = 1.45 and not the 1.0 of a log-uniform aspect.
    area = (height + 0.5) * (width + 0.5) / 1024
    assert abs(area.mean() - 0.21) < 0.01
    assert abs(((height + 0.5) / (width + 0.5)).mean() - 1.45) < 0.06
    # The position is uniform over the room that the box has.
    room = 32 - height
    place = (top + 0.5) / (room + 1)
    assert abs(place.mean() - 0.5) < 0.02
    roomy = room > 8
    assert abs(np.var(place[roomy]) - ((1 - (room[roomy] + 1.0) ** -2) / 12).mean()) < 0.006
    assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 32, 32)

    fill = result[applied][np.arange(applied.sum()), top, left]
    np.testing.assert_array_equal(fill[:, 1:], 0)  # red
    pixels = np.where(filled[applied], result[applied][..., 0], fill[:, None, None, 0])
    np.testing.assert_array_equal(pixels, np.broadcast_to(fill[:, None, None, 0], pixels.shape))
    assert chi_square_is_plausible(np.bincount(fill[:, 0], minlength=256).reshape(32, 8).sum(1))
    assert fill[:, 0].max() > 250


def test_official_cutout_needs_three_channels():
    with pytest.raises(DataError, match="3 channels, found 1"):
        official_cutout(jax.random.key(0), jnp.asarray(noise(2, channels=1)))


def test_official_cutout_fits_oblong_images():
    images = noise(500, 8, 40)
    images[..., 1:] = 200
    result = np.asarray(official_cutout(jax.random.key(0), jnp.asarray(images)))
    filled = result[..., 1] == 0
    applied = filled.any((1, 2))
    assert abs(applied.mean() - 0.5) < 0.1
    boxes(filled[applied])


@pytest.mark.parametrize("kind", ["devries", "official", "none"])
def test_augmentation_composes_crop_flip_cutout(kind):
    images = jnp.asarray(noise(8))
    key = jax.random.key(7)
    augmentation = Augmentation(cutout=kind, cutout_size=12)
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    expected = jax.jit(lambda x: random_flip(flip_key, random_crop(crop_key, x, 4)))(images)
    if kind == "devries":
        expected = cutout(cutout_key, expected, 12)
    elif kind == "official":
        expected = official_cutout(cutout_key, expected)
    augmented = jax.jit(augmentation)(key, images)
    assert (augmented.dtype, augmented.shape) == (jnp.uint8, images.shape)
    np.testing.assert_array_equal(augmented, expected)


def test_augmentation_switched_off_is_the_identity():
    images = noise(4, 8, 8, 1)
    off = Augmentation(crop_padding=0, flip=False, cutout="none")
    np.testing.assert_array_equal(off(jax.random.key(0), jnp.asarray(images)), images)


@pytest.mark.parametrize("kind", ["devries", "official"])
def test_each_image_has_draws_of_its_own(kind):
    """An image's result depends on its position, not on the length of the batch."""
    images, key = noise(16), jax.random.key(8)
    augmentation = jax.jit(Augmentation(cutout=kind))
    whole = np.asarray(augmentation(key, jnp.asarray(images)))
    part = np.asarray(augmentation(key, jnp.asarray(images[:5])))
    np.testing.assert_array_equal(whole[:5], part)
    twins = np.asarray(augmentation(key, jnp.asarray(np.tile(images[:1], (16, 1, 1, 1)))))
    assert len({twin.tobytes() for twin in twins}) > 8


def test_augmentation_refuses_bad_arguments():
    for mistake in ({"crop_padding": -1}, {"cutout": "grey"}, {"cutout_size": 0}):
        with pytest.raises(ValueError, match=next(iter(mistake))):
            Augmentation(**mistake)
    with pytest.raises(DataError, match=r"uint8 images .*float32"):
        Augmentation()(jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
    assert hash(Augmentation()) == hash(Augmentation())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_unit_range_is_numpys_division(dtype, compiled):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    convert = jax.jit(to_unit_range, static_argnums=1) if compiled else to_unit_range
    result = np.asarray(convert(jnp.asarray(pixels), dtype))
    expected = pixels.astype(dtype) / np.asarray(255, dtype)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)
    with pytest.raises(DataError, match="uint8"):
        to_unit_range(jnp.zeros(3))
