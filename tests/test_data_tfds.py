"""TFDS builders without TensorFlow, and prepared folders read back."""

import dataclasses
import hashlib
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from official_archives import (
    as_tar,
    as_zip,
    made_tiny_imagenet,
    needs_shared,
    real_cifar10,
    real_cifar100,
)
from test_data_download import Server

from agr_jax.data import load_dataset, prepare, sources
from agr_jax.data.cifar import read_cifar10, read_cifar100, read_coarse_labels
from agr_jax.data.sources import OFFICIAL
from agr_jax.data.tfds_reader import find_prepared
from agr_jax.data.tiny_imagenet import read_tiny_imagenet
from agr_jax.errors import DataError

pytest.importorskip("tensorflow_datasets")
pytest.importorskip("array_record")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A TFDS folder with all three sets, prepared from small archives of the full layouts."""
    root = tmp_path_factory.mktemp("tfds")
    raw = tmp_path_factory.mktemp("raw")
    manual = root / "downloads" / "manual"
    as_tar(real_cifar10(raw, per_file=40), manual / "cifar-10-binary.tar.gz")
    as_tar(real_cifar100(raw, count=150), manual / "cifar-100-binary.tar.gz")
    as_zip(made_tiny_imagenet(raw), manual / "tiny-imagenet-200.zip")
    for name in OFFICIAL:
        path = prepare.prepare(name, root)
        assert path.parent == root / name
    return root, raw


def same(left, right):
    assert left.class_names == right.class_names
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(left, split).images, getattr(right, split).images)
        np.testing.assert_array_equal(getattr(left, split).labels, getattr(right, split).labels)


@needs_shared
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tiny_imagenet"])
def test_prepared_sets_come_back_in_the_official_order(folder, name):
    root, raw = folder
    path = find_prepared(root, name)
    options = {"image_size": 64} if name == "tiny_imagenet" else {}
    loaded = load_dataset(name, directory=str(path), subset_ok=True, **options)
    read = {"cifar10": read_cifar10, "cifar100": read_cifar100}.get(name, read_tiny_imagenet)
    same(loaded, read(raw / OFFICIAL[name].folder))
    assert loaded.source == str(path)


@needs_shared
def test_tiny_imagenet_is_resized_alike(folder):
    root, raw = folder
    path = find_prepared(root, "tiny_imagenet")
    loaded = load_dataset("tiny_imagenet", directory=str(path), subset_ok=True)
    same(loaded, read_tiny_imagenet(raw / "tiny-imagenet-200", image_size=32))


@needs_shared
def test_others_read_it_with_tfds_alone(folder):
    """A process that knows neither this package nor TensorFlow."""
    root, raw = folder
    program = (
        "import sys, json\n"
        "sys.modules['agr_jax'] = None\n"
        "import tensorflow_datasets as tfds\n"
        "found = {}\n"
        "for name in ('cifar10', 'cifar100', 'tiny_imagenet'):\n"
        "    builder = tfds.builder(name, data_dir=sys.argv[1])\n"
        "    source = builder.as_data_source('test')\n"
        "    first = min((source[i] for i in range(len(source))), key=lambda e: e['id'])\n"
        "    found[name] = [len(source), first['image'].sum().item(), int(first['label']),\n"
        "                   list(first['image'].shape), sorted(first)]\n"
        "print(json.dumps(found))\n"
        "assert 'tensorflow' not in sys.modules or not hasattr(sys.modules['tensorflow'], 'io')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True, cwd=raw
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "cifar10": read_cifar10(raw / "cifar-10-batches-bin").test,
        "cifar100": read_cifar100(raw / "cifar-100-binary").test,
        "tiny_imagenet": read_tiny_imagenet(raw / "tiny-imagenet-200").test,
    }
    for name, split in expected.items():
        count, total, label, shape, fields = found[name]
        assert count == len(split)
        assert total == split.images[0].sum()
        assert label == split.labels[0]
        assert shape == list(split.images.shape[1:])
        assert {"id", "image", "label"} <= set(fields)


@needs_shared
def test_the_coarse_labels_are_kept(folder):
    import tensorflow_datasets as tfds

    root, raw = folder
    coarse, names = read_coarse_labels(raw / "cifar-100-binary")
    builder = tfds.builder_from_directory(find_prepared(root, "cifar100"))
    assert tuple(builder.info.features["coarse_label"].names) == names
    assert len(names) == 20
    source = builder.as_data_source("train")
    found = {e["id"].decode(): e["coarse_label"] for e in (source[i] for i in range(len(source)))}
    assert [found[f"train_{i:05d}"] for i in range(150)] == coarse["train"].tolist()


def test_importing_the_builders_makes_tiny_imagenet_known(tmp_path):
    program = (
        "import tensorflow_datasets as tfds\n"
        "import agr_jax.data.tfds_builders\n"
        "import sys\n"
        "builder = tfds.builder('tiny_imagenet', data_dir=sys.argv[1])\n"
        "print(builder.info.features['label'].num_classes, builder.version)\n"
        "print(tfds.builder('cifar10', data_dir=sys.argv[1]).version)\n"  # TFDS's own, beside ours
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["200", "1.0.0", "3.0.2"]


@needs_shared
def test_preparing_again_leaves_it_as_it_is(folder):
    root, _ = folder
    path = find_prepared(root, "cifar10")
    before = {p: p.stat().st_mtime_ns for p in path.iterdir()}
    assert prepare.prepare("cifar10", root) == path
    assert {p: p.stat().st_mtime_ns for p in path.iterdir()} == before


def as_tfrecords(prepared: Path, target: Path) -> Path:
    """The same examples in TFRecord framing, as TensorFlow writes it, but for its checksums."""
    from array_record.python import array_record_module

    target.mkdir(parents=True)
    for path in (*prepared.glob("*.labels.txt"), prepared / "features.json"):
        (target / path.name).write_bytes(path.read_bytes())
    info = json.loads((prepared / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        split["filepathTemplate"] = split["filepathTemplate"].replace("array_record", "tfrecord")
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        assert split["filepathTemplate"] == template
    (target / "dataset_info.json").write_text(json.dumps(info))
    for path in prepared.glob("*.array_record-*"):
        reader = array_record_module.ArrayRecordReader(str(path))
        records = [reader.read([i])[0] for i in range(reader.num_records())]
        framed = b"".join(struct.pack("<QI", len(r), 0) + r + bytes(4) for r in records)
        (target / path.name.replace("array_record", "tfrecord")).write_bytes(framed)
        reader.close()
    return target


@needs_shared
def test_tfrecord_files_are_read_too(folder, tmp_path):
    root, raw = folder
    path = as_tfrecords(find_prepared(root, "cifar10"), tmp_path / "cifar10" / "3.0.2")
    loaded = load_dataset("cifar10", directory=str(tmp_path), subset_ok=True)
    assert loaded.source == str(path)
    same(loaded, read_cifar10(raw / "cifar-10-batches-bin"))
    (shard,) = path.glob("*-train.tfrecord-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"3\.0\.2: damaged: .*ends within a record"):
        load_dataset("cifar10", directory=str(tmp_path), subset_ok=True)


def copied(folder, name, tmp_path):
    return shutil.copytree(find_prepared(folder[0], name), tmp_path / name / "3.0.2")


@needs_shared
@pytest.mark.parametrize("damage", ["truncated", "missing", "info", "features", "bytes"])
def test_damaged_prepared_folders_are_refused(folder, tmp_path, damage):
    path = copied(folder, "cifar10", tmp_path)
    (shard,) = path.glob("*-test.array_record-*")
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    elif damage == "missing":
        shard.unlink()
    elif damage == "info":
        (path / "dataset_info.json").write_text("{")
    elif damage == "features":
        (path / "features.json").write_text("{}")
    else:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 255
        shard.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10/3\.0\.2.*(damaged|expected)"):
        load_dataset("cifar10", directory=str(path), subset_ok=True)


@needs_shared
def test_another_data_set_is_refused(folder):
    path = find_prepared(folder[0], "cifar100")
    with pytest.raises(DataError, match=r"expected cifar10 with .* found cifar100"):
        load_dataset("cifar10", directory=str(path), subset_ok=True)


def test_the_newest_version_is_taken(tmp_path):
    for version in ("3.0.2", "3.0.10", "1.2.0", "3.0.2.incomplete"):
        folder = tmp_path / "cifar10" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").touch()
        (folder / "features.json").touch()
    assert find_prepared(tmp_path, "cifar10") == tmp_path / "cifar10" / "3.0.10"
    assert find_prepared(tmp_path / "cifar10", "cifar10") == tmp_path / "cifar10" / "3.0.10"
    assert find_prepared(tmp_path, "cifar100") is None


# ---- the command


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No data set of this machine is found."""
    (tmp_path / "cwd").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    return tmp_path


def test_the_command_says_what_is_wrong(nowhere, capsys, monkeypatch):
    assert prepare.main(["cifar10", f"--source={nowhere}/none"]) == 2
    assert "error: " in capsys.readouterr().err
    damaged = nowhere / "cifar-10-binary.tar.gz"
    damaged.write_bytes(b"no archive")
    assert prepare.main(["cifar10", f"--source={damaged}", f"--dir={nowhere}/tfds"]) == 2
    assert "damaged archive" in capsys.readouterr().err
    assert find_prepared(nowhere / "tfds", "cifar10") is None
    folder = made_tiny_imagenet(nowhere, classes=3)
    assert prepare.main(["tiny_imagenet", f"--source={folder}", f"--dir={nowhere}/tfds"]) == 2
    assert "expected 200 classes, found 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main(["imagenet"])


@needs_shared
def test_the_command_prepares_what_it_downloads(nowhere, monkeypatch):
    """With the official address replaced by a server on this machine."""
    archive = as_tar(real_cifar10(nowhere, per_file=10), nowhere / "made.tar.gz")
    content = archive.read_bytes()
    server = Server()
    monkeypatch.setattr("test_data_download.CONTENT", content)
    here = dataclasses.replace(
        OFFICIAL["cifar10"],
        address=server.address,
        archive_bytes=len(content),
        checksum=f"sha256:{hashlib.sha256(content).hexdigest()}",
    )
    from agr_jax.data import tfds_builders

    monkeypatch.setattr(tfds_builders.Cifar10, "official", here)
    assert prepare.main(["cifar10", f"--dir={nowhere}/tfds"]) == 0
    assert (nowhere / "tfds/downloads/manual/cifar-10-binary.tar.gz").read_bytes() == content
    loaded = load_dataset("cifar10", directory=str(nowhere / "tfds/cifar10/3.0.2"), subset_ok=True)
    same(loaded, read_cifar10(nowhere / "cifar-10-batches-bin"))
    # A run downloads by itself.
    monkeypatch.setitem(sources.OFFICIAL, "cifar10", here)
    loaded = load_dataset("cifar10", subset_ok=True, may_download=True)
    assert loaded.source == str(
        nowhere / "home/tensorflow_datasets/downloads/manual/cifar-10-binary.tar.gz"
    )
    server.server.shutdown()
    server.server.server_close()
