"""A user's own tree of images: layout, formats, sizes, and every mistake that trees have."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from agr_jax.data import load_dataset
from agr_jax.data.decoding import decode
from agr_jax.data.image_folder import read_image_folder
from agr_jax.errors import DataError

CLASSES = ("ant", "bee", "cat")


def encoded(pixels, kind="PNG", **options):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def plain(value, shape=(16, 16, 3)):
    return np.full(shape, value, np.uint8)


@pytest.fixture
def tree(tmp_path):
    """Two training images and one test image of each class; their grey value tells them apart."""
    for c, name in enumerate(CLASSES):
        for split, count in (("train", 2), ("test", 1)):
            folder = tmp_path / "insects" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encoded(plain(60 * c + 20 * i + 5)))
    return tmp_path / "insects"


def test_folders_are_classes_and_files_come_in_order(tree):
    dataset = read_image_folder(tree, image_size=16)
    assert dataset.class_names == CLASSES
    assert dataset.train.images.shape == (6, 16, 16, 3)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [5, 25, 65, 85, 125, 145]
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == [0, 1, 2]
    assert dataset.name == "insects"
    assert dataset.complete
    assert dataset.describe() == f"insects: 6 + 3 images of 16x16x3, 3 classes, from {tree}"


def test_val_serves_where_there_is_no_test(tree):
    (tree / "test").rename(tree / "val")
    assert len(read_image_folder(tree, image_size=16).test) == 3


def test_all_formats_and_modes_are_read(tree):
    folder = tree / "train" / "ant"
    for file in folder.iterdir():
        file.unlink()
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[..., 1] = 200
    (folder / "a.JPG").write_bytes(encoded(colour, "JPEG", quality=95))
    (folder / "b.jpeg").write_bytes(encoded(colour, "JPEG", quality=95))
    (folder / "c.png").write_bytes(encoded(colour))
    (folder / "d.WebP").write_bytes(encoded(colour, "WEBP", lossless=True))
    (folder / "e.png").write_bytes(encoded(plain(77, (16, 16))))  # grey
    (folder / "f.png").write_bytes(encoded(np.concatenate([colour, plain(9, (16, 16, 1))], -1)))
    stream = io.BytesIO()
    palette = Image.fromarray(colour).convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(stream, "PNG", transparency=b"\x00\xff")
    (folder / "g.png").write_bytes(stream.getvalue())
    (folder / "notes.txt").write_text("left out")
    (folder / ".hidden.png").write_bytes(b"left out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = read_image_folder(tree, image_size=16).train.images[:7].astype(int)
    for image in images[[0, 1, 2, 3, 5, 6]]:
        assert np.abs(image - colour).max() <= 3
    np.testing.assert_array_equal(images[4], plain(77))


def test_crop_keeps_the_middle_and_the_proportions():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    np.testing.assert_array_equal(decoded(wide, 10, "crop"), plain(255, (10, 10, 3)))
    tall = wide.transpose(1, 0, 2)
    np.testing.assert_array_equal(decoded(tall, 10, "crop"), plain(255, (10, 10, 3)))


def decoded(pixels, size, resize):
    return decode(encoded(pixels), size, source="here", name="image", resize=resize)


def test_stretch_keeps_everything():
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 15:] = 255
    found = decoded(wide, 10, "stretch")
    assert (found[:, :4] == 0).all()
    assert (found[:, 6:] == 255).all()


@pytest.mark.parametrize(("height", "width"), [(24, 24), (24, 40), (41, 24), (7, 5)])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_resizing_is_pillows(height, width, size):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    shorter = min(height, width)
    scaled = [max(size, round(side * size / shorter)) for side in (width, height)]
    resized = np.asarray(image.resize(scaled, Image.Resampling.BILINEAR))
    top, left = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    expected = resized[top : top + size, left : left + size]
    np.testing.assert_array_equal(decoded(pixels, size, "crop"), expected)
    expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decoded(pixels, size, "stretch"), expected)


def refused(tree, match, **options):
    with pytest.raises(DataError, match=match):
        read_image_folder(tree, **{"image_size": 16, **options})


def test_an_unreadable_file_is_named(tree):
    (tree / "train/bee/1.png").write_bytes(b"no image")
    refused(tree, r"insects: unreadable image train/bee/1.png: .*8 bytes")
    whole = encoded(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    (tree / "train/bee/1.png").write_bytes(whole[: len(whole) // 2])
    refused(tree, r"unreadable image train/bee/1.png")
    (tree / "train/bee/1.png").unlink()
    (tree / "train/bee/1.png").mkdir()
    refused(tree, r"train/bee/1.png: unreadable image")


def test_images_that_would_fill_the_memory_are_refused(tree):
    bomb = Image.new("1", (10_000, 10_000))
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bomb.save(stream, "PNG")
    assert len(stream.getvalue()) < 20_000
    (tree / "train/ant/9.png").write_bytes(stream.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        refused(tree, r"image train/ant/9.png: expected at most 64,000,000 pixels, found 10000x")


def test_sixteen_bits_a_channel_are_refused(tree):
    deep = np.full((16, 16), 40_000, np.uint16)
    (tree / "train/ant/9.png").write_bytes(encoded(deep))
    refused(tree, r"9.png: expected 8 bits a channel, found 16")
    (tree / "train/ant/9.png").write_bytes(deep_colour_png(16))
    refused(tree, r"9.png: expected 8 bits a channel, found 16")


def deep_colour_png(side):
    """An RGB image of 16 bits a channel, which Pillow reads but cannot write."""

    def chunk(kind, content):
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    rows = side * (b"\0" + side * 6 * b"\x80")
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_wrong_layouts_say_what_was_expected(tree, tmp_path):
    refused(tmp_path / "none", "expected the folders train and test .*no such folder")
    refused(tmp_path, "expected the folders train and test .*found insects")
    (tree / "test" / "dog").mkdir()
    refused(tree, r"expected the classes of train \(ant, bee, cat\), found also dog")
    (tree / "test" / "dog").rmdir()
    (tree / "train" / "dog").mkdir()
    refused(tree, r"train/dog: expected images .*found none")
    (tree / "train" / "dog").rmdir()
    for folder in (tree / "test").iterdir():
        (folder / "0.png").unlink()
    refused(tree, r"test: expected images .* in folders of the classes ant, bee, cat, found none")
    refused(tree, "image_size must be >= 1", image_size=0)
    refused(tree, "resize must be 'crop' or 'stretch', got 'pad'", resize="pad")


def test_one_class_is_none(tmp_path):
    (tmp_path / "train/only").mkdir(parents=True)
    (tmp_path / "test/only").mkdir(parents=True)
    refused(tmp_path, "at least 2 classes, found only")


def test_by_name(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with pytest.raises(DataError, match="dir must name the folder"):
        load_dataset("image_folder", image_size=16)
    with pytest.raises(DataError, match="image_size must be given"):
        load_dataset("image_folder", directory=str(tree))
    options = {"directory": str(tree), "image_size": 8, "use_cache": True}
    first = load_dataset("image_folder", **options)
    again = load_dataset("image_folder", **options)
    np.testing.assert_array_equal(first.train.images, again.train.images)
    (tree / "train/ant/7.png").write_bytes(encoded(plain(1)))
    assert len(load_dataset("image_folder", **options).train) == 7
    stretched = load_dataset("image_folder", resize="stretch", **options)
    assert stretched.train.images.shape == (7, 8, 8, 3)
