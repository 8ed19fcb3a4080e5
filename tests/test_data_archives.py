"""Archives and official file formats: what is read, and every kind of damage that is refused."""

import gzip
import io
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agr_jax.data.archives import MissingMembersError, ZipMembers, read_tar_members
from agr_jax.data.cifar import read_cifar10, read_cifar100
from agr_jax.data.tiny_imagenet import read_tiny_imagenet
from agr_jax.errors import DataError

SHARED = Path(__file__).parents[1].parent / "shared"
needs_shared = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"real images are not there: {SHARED / 'data'}"
)
BATCHES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
WORDNET_IDS = ("n02", "n01", "n03")


def cifar_records(labels, seed=0):
    """Records with the given label bytes [N, bytes], and their images [N, 32, 32, 3]."""
    labels = np.asarray(labels, np.uint8)
    planes = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    records = b"".join(
        head.tobytes() + body.tobytes() for head, body in zip(labels, planes, strict=True)
    )
    return records, np.moveaxis(planes, 1, -1)


def make_cifar10(root):
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    images = {}
    for seed, file in enumerate(BATCHES):
        records, images[file] = cifar_records([[label] for label in range(10)], seed)
        (folder / file).write_bytes(records)
    return folder, images


def make_cifar100(root):
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for seed, file in enumerate(("train.bin", "test.bin")):
        records, _ = cifar_records([[i // 5, i] for i in range(100)], seed)
        (folder / file).write_bytes(records)
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine{i}" for i in range(100)) + "\n\n")
    return folder


def jpeg(seed, mode="RGB", size=64):
    """A smooth image, so that Pillow's resize matters but the JPEG stays small."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(small).resize((size, size)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "JPEG")
    return stream.getvalue()


def make_tiny(root):
    folder = root / "tiny-imagenet-200"
    (folder / "val/images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(WORDNET_IDS) + "\n")
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius\nn02\tnewt\nn99\tunused\n")
    for c, wordnet_id in enumerate(WORDNET_IDS):
        images = folder / "train" / wordnet_id / "images"
        images.mkdir(parents=True)
        for i in range(2):
            mode = "L" if i else "RGB"
            (images / f"{wordnet_id}_{i}.JPEG").write_bytes(jpeg(10 * c + i, mode))
        (images.parent / f"{wordnet_id}_boxes.txt").write_text("")
    lines = []
    for i, wordnet_id in enumerate(("n03", "n01", "n02", "n03")):
        (folder / f"val/images/val_{i}.JPEG").write_bytes(jpeg(100 + i))
        lines.append(f"val_{i}.JPEG\t{wordnet_id}\t0\t0\t1\t1\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    return folder


def make_tar(folder, path):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(folder, arcname=folder.name)
    return path


def make_zip(folder, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


def tar_of(path, *members):
    """A .tar.gz of (TarInfo, content) pairs."""
    with tarfile.open(path, "w:gz") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_read_tar_members_returns_wanted_and_optional_members(tmp_path):
    path = tar_of(
        tmp_path / "a.tar.gz",
        (tarfile.TarInfo("./d/one"), b"1"),
        (tarfile.TarInfo("d/two"), b"22"),
        (tarfile.TarInfo("readme"), b"..."),
    )
    assert read_tar_members(path, {"d/one": 1}, optional={"d/two": 9, "no": 9}) == {
        "d/one": b"1",
        "d/two": b"22",
    }


def test_read_tar_members_names_missing_and_found_members(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", (tarfile.TarInfo("other"), b"1"))
    with pytest.raises(MissingMembersError, match=r"missing d/one; found other") as caught:
        read_tar_members(path, {"d/one": 1})
    assert caught.value.found == ("other",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../evil", "'..'"),
        ("d/../../evil", "'..'"),
        ("d\\..\\evil", "'..'"),
        ("/etc/evil", "absolute"),
        ("C:\\evil", "absolute"),
    ],
)
def test_archives_refuse_names_that_lead_outside(tmp_path, name, message):
    tar = tar_of(tmp_path / "a.tar.gz", (tarfile.TarInfo(name), b"x"))
    with pytest.raises(DataError, match="refused") as caught:
        read_tar_members(tar, {"d": 1})
    assert message in str(caught.value)
    assert str(tar) in str(caught.value)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DataError, match="refused"):
        ZipMembers(tmp_path / "a.zip", member_limit=10, total_limit=10)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_tar_refuses_links_and_devices(tmp_path, kind):
    info = tarfile.TarInfo("d/one")
    info.type, info.linkname = kind, "/etc/passwd"
    path = tar_of(tmp_path / "a.tar.gz", (info, b""))
    with pytest.raises(DataError, match="'d/one' is a link"):
        read_tar_members(path, {"d/one": 10})


def test_tar_refuses_large_and_repeated_members(tmp_path):
    path = tar_of(tmp_path / "a.tar.gz", (tarfile.TarInfo("one"), b"123"))
    with pytest.raises(DataError, match="at most 2 uncompressed bytes in one, found 3"):
        read_tar_members(path, {"one": 2})
    path = tar_of(
        tmp_path / "b.tar.gz", (tarfile.TarInfo("one"), b"1"), (tarfile.TarInfo("one"), b"2")
    )
    with pytest.raises(DataError, match="one comes twice"):
        read_tar_members(path, {"one": 2})


def test_tar_refuses_a_bomb_of_other_members(tmp_path):
    bomb = (tarfile.TarInfo("zeros"), bytes(17 * 2**20))
    path = tar_of(tmp_path / "a.tar.gz", (tarfile.TarInfo("one"), b"1"), bomb)
    assert path.stat().st_size < 50_000
    with pytest.raises(DataError, match="expected at most 16,777,217 uncompressed bytes"):
        read_tar_members(path, {"one": 1})


@pytest.mark.parametrize("kept", [0.0, 1e-5, 0.01, 0.5, 0.95, "last byte", "checksum"])
def test_truncated_tar_is_named_with_what_was_found(tmp_path, kept):
    folder, _ = make_cifar10(tmp_path)
    path = make_tar(folder, tmp_path / "cifar-10-binary.tar.gz")
    whole = path.read_bytes()
    cut = {"last byte": -1, "checksum": -8}.get(kept) or int(len(whole) * kept)
    path.write_bytes(whole[:cut])
    with pytest.raises(DataError) as caught:
        read_cifar10(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ({len(whole[:cut]):,} bytes): damaged archive: expected")
    assert "data_batch_1.bin" in message
    assert "of these files" in message


def test_corrupted_tar_is_refused(tmp_path):
    folder, _ = make_cifar10(tmp_path)
    path = make_tar(folder, tmp_path / "cifar-10-binary.tar.gz")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="damaged archive"):
        read_cifar10(path)
    path.write_bytes(b"<html>404 not found</html>")
    with pytest.raises(DataError, match=r"damaged archive.*[Nn]ot a gzipped file"):
        read_cifar10(path)
    path.write_bytes(gzip.compress(b"not a tar file" * 100))
    with pytest.raises(DataError, match="damaged archive"):
        read_cifar10(path)
    with pytest.raises(DataError, match="no such file"):
        read_cifar10(tmp_path / "absent.tar.gz")


def test_zip_refuses_links_bombs_encryption_and_repeats(tmp_path):
    def open_zip(member_limit=100, total_limit=100):
        return ZipMembers(path, member_limit=member_limit, total_limit=total_limit)

    path = tmp_path / "a.zip"
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="link is a link"):
        open_zip()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(60))
        archive.writestr("b", bytes(60))
    with pytest.raises(DataError, match="at most 50 uncompressed bytes in a, found 60"):
        open_zip(member_limit=50)
    with pytest.raises(DataError, match="at most 100 uncompressed bytes in all together"):
        open_zip()
    with open_zip(total_limit=120) as members:
        assert members.names == ("a", "b")
        assert members.read("b") == bytes(60)
        with pytest.raises(DataError, match="expected the member c"):
            members.read("c")
    encrypted = bytearray(path.read_bytes())
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(DataError, match="a is encrypted"):
        open_zip(total_limit=120)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", bytes(60))
    with pytest.raises(DataError, match="compression method 12"):
        open_zip()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("./a", b"2")
    with pytest.raises(DataError, match="a comes twice"):
        open_zip()


def test_zip_that_declares_less_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(10_000))
    lying = path.read_bytes().replace((10_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    path.write_bytes(lying)
    with (
        ZipMembers(path, member_limit=100, total_limit=100) as members,
        pytest.raises(DataError, match="damaged archive"),
    ):
        members.read("a")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_truncated_zip_is_named(tmp_path, kept):
    path = make_zip(make_tiny(tmp_path), tmp_path / "tiny-imagenet-200.zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match=r"tiny-imagenet-200.zip \(.*bytes\): damaged archive"):
        read_tiny_imagenet(path)


def test_corrupted_zip_member_is_named(tmp_path):
    path = make_zip(make_tiny(tmp_path), tmp_path / "tiny-imagenet-200.zip")
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"\xff\xd8\xff") + 200] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"damaged archive: expected .* intact bytes of .*JPEG"):
        read_tiny_imagenet(path)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_reads_the_images_that_were_written(tmp_path, packed):
    path, images = make_cifar10(tmp_path)
    if packed:
        path = make_tar(path, tmp_path / "cifar-10-binary.tar.gz")
    dataset = read_cifar10(path)
    np.testing.assert_array_equal(
        dataset.train.images, np.concatenate([images[file] for file in BATCHES[:5]])
    )
    np.testing.assert_array_equal(dataset.test.images, images["test_batch.bin"])
    np.testing.assert_array_equal(dataset.train.labels, np.tile(np.arange(10), 5))
    assert (dataset.class_names[0], dataset.class_names[9]) == ("airplane", "truck")
    assert not dataset.complete
    assert dataset.source == str(path)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_reads_fine_labels_and_names(tmp_path, packed):
    path = make_cifar100(tmp_path)
    if packed:
        path = make_tar(path, tmp_path / "cifar-100-binary.tar.gz")
    dataset = read_cifar100(path)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(100))
    assert dataset.class_names[7] == "fine7"
    assert dataset.image_shape == (32, 32, 3)


def test_cifar_class_names_have_fallbacks_and_are_counted(tmp_path):
    cifar100, (cifar10, _) = make_cifar100(tmp_path), make_cifar10(tmp_path)
    (cifar100 / "fine_label_names.txt").unlink()
    assert read_cifar100(cifar100).class_names[99] == "class_99"
    (cifar10 / "batches.meta.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"batches.meta.txt: expected 10 class names, found 2"):
        read_cifar10(cifar10)


def test_cifar_refuses_wrong_sizes(tmp_path):
    folder, _ = make_cifar10(tmp_path)
    file = folder / "data_batch_3.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3.bin: expected a multiple of 3073.*30,729"):
        read_cifar10(folder)
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"multiple of 3073 bytes .* found 0 bytes"):
        read_cifar10(folder)
    file.write_bytes(bytes(3073 * 10_001))
    with pytest.raises(DataError, match=r"at most 30,730,000 bytes, found 30,733,073"):
        read_cifar10(folder)
    folder = make_cifar100(tmp_path)
    (folder / "test.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"test.bin: expected a multiple of 3074"):
        read_cifar100(folder)


def test_cifar_names_labels_out_of_range(tmp_path):
    folder, _ = make_cifar10(tmp_path)
    (folder / "test_batch.bin").write_bytes(cifar_records([[3], [10]])[0])
    with pytest.raises(DataError, match=r"test_batch.bin: label 10 of record 1 is outside 0\.\.9"):
        read_cifar10(folder)
    folder = make_cifar100(tmp_path)
    for labels, kind in (([3, 100], "fine label 100"), ([20, 3], "coarse label 20")):
        (folder / "train.bin").write_bytes(cifar_records([labels])[0])
        with pytest.raises(DataError, match=rf"train.bin: {kind} of record 0"):
            read_cifar100(folder)


def test_cifar_names_missing_files(tmp_path):
    folder, _ = make_cifar10(tmp_path)
    (folder / "data_batch_2.bin").unlink()
    (folder / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"missing data_batch_2.bin, test_batch.bin"):
        read_cifar10(folder)
    with pytest.raises(MissingMembersError, match=r"missing cifar-10-batches-bin/data_batch_2.bin"):
        read_cifar10(make_tar(folder, tmp_path / "cifar-10-binary.tar.gz"))


def test_cifar_never_reads_the_pickle_version(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"\x80\x04.")
    archive = make_tar(folder, tmp_path / "cifar-10-python.tar.gz")
    renamed = shutil.copy(archive, tmp_path / "cifar-10-binary.tar.gz")
    for path in (folder, archive, renamed):
        with pytest.raises(DataError, match=r"never read .* cifar-10-binary.tar.gz"):
            read_cifar10(path)
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    with pytest.raises(DataError, match=r"never read .* cifar-100-binary.tar.gz"):
        read_cifar100(folder)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [64, 32])
def test_tiny_imagenet_reads_the_official_layout(tmp_path, packed, size):
    folder = make_tiny(tmp_path)
    path = make_zip(folder, tmp_path / "tiny-imagenet-200.zip") if packed else folder
    dataset = read_tiny_imagenet(path, image_size=size)
    assert dataset.class_names == ("goldfish", "newt", "n03")  # sorted ids, not wnids.txt's order
    np.testing.assert_array_equal(dataset.train.labels, [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(dataset.test.labels, [2, 0, 1, 2])
    for image, file in (
        (dataset.train.images[2], "train/n02/images/n02_0.JPEG"),
        (dataset.train.images[3], "train/n02/images/n02_1.JPEG"),  # grey
        (dataset.test.images[1], "val/images/val_1.JPEG"),
    ):
        expected = Image.open(io.BytesIO((folder / file).read_bytes())).convert("RGB")
        if size == 32:
            expected = expected.resize((32, 32), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(image, np.asarray(expected))
    assert not dataset.complete


def test_tiny_imagenet_resize_is_a_triangle_filter(tmp_path):
    """Halving with the antialiased filter weighs 4 pixels a side 1:3:3:1, away from the border."""
    folder = make_tiny(tmp_path)
    large = read_tiny_imagenet(folder, image_size=64).train.images[0].astype(float)
    small = read_tiny_imagenet(folder, image_size=32).train.images[0]
    weights = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    windows = np.lib.stride_tricks.sliding_window_view(large, (4, 4), axis=(0, 1))[1::2, 1::2]
    expected = (windows * weights).sum((-1, -2))
    assert np.abs(small[1:-1, 1:-1] - expected).max() <= 1.5


def test_tiny_imagenet_names_what_is_wrong(tmp_path):
    folder = make_tiny(tmp_path)
    image = folder / "train/n03/images/n03_1.JPEG"
    whole = image.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"GIF89a"):
        image.write_bytes(content)
        with pytest.raises(DataError, match=r"unreadable image train/n03/images/n03_1.JPEG"):
            read_tiny_imagenet(folder)
    image.write_bytes(jpeg(0, size=48))
    with pytest.raises(DataError, match=r"n03_1.JPEG: expected 64x64 pixels, found 48x48"):
        read_tiny_imagenet(folder)
    with pytest.raises(DataError, match="image_size must be 32 or 64, got 48"):
        read_tiny_imagenet(folder, image_size=48)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("wnids.txt", "expected the file wnids.txt"),
        ("train/n01", "expected JPEG images in train/n01/images, found none"),
        ("val/images/val_2.JPEG", "expected the image val/images/val_2.JPEG"),
        ("val/val_annotations.txt", "expected the file val/val_annotations.txt"),
    ],
)
def test_tiny_imagenet_names_what_is_missing(tmp_path, lost, message):
    folder = make_tiny(tmp_path)
    if (folder / lost).is_dir():
        shutil.rmtree(folder / lost)
    else:
        (folder / lost).unlink()
    with pytest.raises(DataError, match=message):
        read_tiny_imagenet(folder)


def test_tiny_imagenet_checks_annotations_and_tolerates_missing_words(tmp_path):
    folder = make_tiny(tmp_path)
    (folder / "words.txt").unlink()
    assert read_tiny_imagenet(folder).class_names == ("n01", "n02", "n03")
    (folder / "val/val_annotations.txt").write_text("val_0.JPEG\tn77\t0\t0\t1\t1\n")
    with pytest.raises(DataError, match=r"val_annotations.txt: .*found 'val_0.JPEG.*n77"):
        read_tiny_imagenet(folder)


@pytest.fixture(scope="session")
def official_files(tmp_path_factory):
    """The real images in their official layouts, written by shared/data/unpack.py."""
    out = tmp_path_factory.mktemp("official")
    subprocess.run([sys.executable, SHARED / "data/unpack.py", out, "--tar"], check=True)
    yield out
    shutil.rmtree(out)


@needs_shared
@pytest.mark.slow
def test_real_cifar_archives_equal_their_folders(official_files):
    for read, folder, archive in (
        (read_cifar10, "cifar-10-batches-bin", "cifar-10-binary.tar.gz"),
        (read_cifar100, "cifar-100-binary", "cifar-100-binary.tar.gz"),
    ):
        unpacked, packed = read(official_files / folder), read(official_files / archive)
        assert unpacked.class_names == packed.class_names
        for part in ("train", "test"):
            a, b = getattr(unpacked, part), getattr(packed, part)
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_array_equal(a.labels, b.labels)
        assert packed.complete == unpacked.complete == (read is read_cifar10)
    path = official_files / "cifar-10-binary.tar.gz"
    with path.open("r+b") as file:
        file.truncate(100_000_000)
    with pytest.raises(DataError, match="damaged archive"):
        read_cifar10(path)


@needs_shared
@pytest.mark.parametrize("packed", [False, True])
def test_real_cifar10_batch_equals_its_packed_images(tmp_path, packed):
    """A real batch through the binary layout gives the pixels of shared/data's lossless images."""
    pack = np.load(SHARED / "data/cifar-10/test_batch.npz", allow_pickle=False)
    blob, offsets = pack["webp"].tobytes(), pack["offsets"]
    images = np.stack(
        [np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]]))) for i in range(200)]
    )
    labels = pack["labels"][:200].astype(np.uint8)
    records = [
        bytes([y]) + x.transpose(2, 0, 1).tobytes() for x, y in zip(images, labels, strict=True)
    ]
    path, _ = make_cifar10(tmp_path)
    (path / "test_batch.bin").write_bytes(b"".join(records))
    if packed:
        path = make_tar(path, tmp_path / "cifar-10-binary.tar.gz")
    dataset = read_cifar10(path)
    np.testing.assert_array_equal(dataset.test.images, images)
    np.testing.assert_array_equal(dataset.test.labels, labels)


@pytest.mark.slow
@needs_shared
def test_real_tiny_imagenet_archive():
    dataset = read_tiny_imagenet(SHARED / "data/tiny-imagenet-20.zip", image_size=32)
    assert dataset.train.images.shape == (10_000, 32, 32, 3)
    assert dataset.test.images.shape == (1_000, 32, 32, 3)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), np.full(20, 500))
    np.testing.assert_array_equal(np.bincount(dataset.test.labels), np.full(20, 50))
    assert dataset.class_names[0] == "goldfish"
    assert not dataset.complete
