"""Official archives and folders for tests: of real images where there are some, else made ones."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
CIFAR10_FILES = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"real images are not there: {SHARED}"
)


def real_records(path: Path, count: int) -> bytes:
    """The first official binary records of one packed file of real images."""
    with np.load(path, allow_pickle=False) as pack:
        blob, offsets = pack["webp"].tobytes(), pack["offsets"]
        heads = [pack[k] for k in ("coarse_labels", "labels") if k in pack.files]
    records = []
    for i in range(count):
        image = Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]])).convert("RGB")
        planes = np.asarray(image).transpose(2, 0, 1).tobytes()
        records.append(bytes(int(head[i]) for head in heads) + planes)
    return b"".join(records)


def real_cifar10(root: Path, per_file: int = 300) -> Path:
    """`cifar-10-batches-bin` with the first real images of each file."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name in CIFAR10_FILES:
        packed = SHARED / "cifar-10" / name.replace(".bin", ".npz")
        (folder / name).write_bytes(real_records(packed, per_file))
    return folder


def real_cifar100(root: Path, count: int = 1500) -> Path:
    """`cifar-100-binary` with real images."""
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    for name, number in (("train", count), ("test", count // 3)):
        records = real_records(SHARED / "cifar-100-subset" / f"{name}.npz", number)
        (folder / f"{name}.bin").write_bytes(records)
    for name in ("fine_label_names.txt", "coarse_label_names.txt"):
        (folder / name).write_bytes((SHARED / "cifar-100-subset" / name).read_bytes())
    return folder


def jpeg(seed: int, mode: str = "RGB", size: int = 64) -> bytes:
    """A smooth image of one colour that tells it apart."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(small).resize((size, size)).convert(mode).save(stream, "JPEG")
    return stream.getvalue()


def made_tiny_imagenet(root: Path, classes: int = 200, train: int = 4, test: int = 1) -> Path:
    """`tiny-imagenet-200` of the full layout with few, made images; every fourth one is grey."""
    folder = root / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    ids = [f"n{1000 + 7 * c:08d}" for c in range(classes)]
    (folder / "wnids.txt").write_text("\n".join(reversed(ids)) + "\n")
    (folder / "words.txt").write_text("".join(f"{i}\tthing {i[-3:]}, more\n" for i in ids))
    annotations = []
    for c, name in enumerate(ids):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for i in range(train):
            mode = "L" if i % 4 == 3 else "RGB"
            (images / f"{name}_{i}.JPEG").write_bytes(jpeg(100 * c + i, mode))
        for i in range(test):
            file = f"val_{c * test + i}.JPEG"
            (folder / "val" / "images" / file).write_bytes(jpeg(10**6 + 100 * c + i))
            annotations.append(f"{file}\t{name}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    return folder


def as_tar(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        archive.add(folder, arcname=folder.name)
    return path


def as_zip(folder: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path
