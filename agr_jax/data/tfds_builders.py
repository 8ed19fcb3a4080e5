"""TFDS builders that need no TensorFlow: CIFAR-10, CIFAR-100 and Tiny ImageNet.

What they prepare has the names, versions and features of TFDS's own CIFAR builders, as
`array_record`. So `tfds.builder("cifar10", data_dir=...).as_data_source("train")` reads it without
this package. Importing this module makes `tfds.builder("tiny_imagenet")` known, which TFDS lacks;
the CIFAR builders are not registered, since TFDS has builders of these names.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from agr_jax.data import tiny_imagenet
from agr_jax.data.cifar import (
    CIFAR10,
    CIFAR100,
    read_cifar10,
    read_cifar100,
    read_coarse_labels,
)
from agr_jax.data.dataset import Dataset
from agr_jax.data.download import download
from agr_jax.data.official import Official
from agr_jax.data.sources import find_raw
from agr_jax.errors import DataError

Example = tuple[int, dict[str, Any]]
_CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


class _OfficialBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Reads the official archive or folder, from the manual folder or else downloaded.

    Args:
        source: the official archive or folder, where it is stored elsewhere.
        **options: of every TFDS builder, such as `data_dir`.
    """

    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "The official archive is downloaded, unless it is in the manual folder already."
    )
    official: Official
    # Known to `official`. TFDS would look for a file beside this one, and for that needs a package
    # that it does not declare.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, *, source: str | Path | None = None, **options: Any) -> None:
        super().__init__(**{"file_format": "array_record", **options})
        self._source = None if source is None else Path(source)

    def _raw(self, manager: tfds.download.DownloadManager) -> Path:
        """The official archive or folder."""
        if self._source is not None:
            return self._source
        try:
            places = [Path(manager.manual_dir), Path(self.data_dir_root)]
        except AssertionError:  # there is no manual folder, or nothing in it
            places = [Path(self.data_dir_root)]
        for place in places:
            found = find_raw(self.official, place)
            if found is not None:
                return found
        return download(
            self.official.address,
            Path(self.data_dir_root) / "downloads" / "manual" / self.official.archive,
            size=self.official.archive_bytes,
            checksum=self.official.checksum,
        )

    def _generate_examples(self, *arguments: Any) -> Iterator[Example]:
        raise NotImplementedError("each split has its own generator")


class Cifar10(_OfficialBuilder, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-10, as TFDS's `cifar10`."""

    name = "cifar10"
    official = CIFAR10
    VERSION = tfds.core.Version("3.0.2")

    def _info(self) -> tfds.core.DatasetInfo:
        return _cifar_info(
            self, {"label": tfds.features.ClassLabel(num_classes=self.official.classes)}
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[Example]]:
        dataset = read_cifar10(self._raw(dl_manager))
        self.info.features["label"].names = list(dataset.class_names)
        return _cifar_splits(dataset, {})


class Cifar100(_OfficialBuilder, skip_registration=True):  # type: ignore[call-arg]
    """CIFAR-100, as TFDS's `cifar100`: with the 20 coarse labels beside the 100 fine ones."""

    name = "cifar100"
    official = CIFAR100
    VERSION = tfds.core.Version("3.0.2")

    def _info(self) -> tfds.core.DatasetInfo:
        return _cifar_info(
            self,
            {
                "label": tfds.features.ClassLabel(num_classes=self.official.classes),
                "coarse_label": tfds.features.ClassLabel(num_classes=20),
            },
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[Example]]:
        path = self._raw(dl_manager)
        dataset = read_cifar100(path)
        coarse, names = read_coarse_labels(path)
        self.info.features["label"].names = list(dataset.class_names)
        self.info.features["coarse_label"].names = list(names)
        return _cifar_splits(dataset, coarse)


class TinyImagenet(_OfficialBuilder):
    """Tiny ImageNet: 200 classes of ImageNet at 64 x 64 pixels.

    The images are the original JPEG files; grey ones are stored as RGB, in PNG, so that all decode
    to three channels. The labelled validation images are the split `test`.
    """

    name = "tiny_imagenet"
    official = tiny_imagenet.TINY_IMAGENET
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="200 classes of ImageNet, 500 training and 50 test images each, 64 x 64.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(64, 64, 3)),
                    "label": tfds.features.ClassLabel(num_classes=self.official.classes),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu/",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[Example]]:
        path = self._raw(dl_manager)
        names, listed = tiny_imagenet.list_files(path)
        if len(names) != self.official.classes:
            raise DataError(
                f"{path}: expected {self.official.classes} classes, found {len(names)}: the "
                "builder prepares the whole set only"
            )
        self.info.features["label"].names = list(names)
        return {split: self._examples(path, split, files) for split, files in listed.items()}

    def _examples(self, path: Path, split: str, files: list[tuple[str, int]]) -> Iterator[Example]:
        for index, (file, label, content) in enumerate(tiny_imagenet.contents(path, files)):
            yield (
                index,
                {
                    "id": f"{split}_{index:06d}",
                    "image": _as_rgb(content, f"{path}: {file}"),
                    "label": label,
                    "file_name": file.rpartition("/")[2],
                },
            )


BUILDERS: dict[str, type[_OfficialBuilder]] = {
    builder.name: builder for builder in (Cifar10, Cifar100, TinyImagenet)
}


def _cifar_info(builder: _OfficialBuilder, labels: dict[str, Any]) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=builder,
        description=f"{builder.official.title}: {builder.official.described}, 32 x 32 pixels.",
        features=tfds.features.FeaturesDict(
            {
                "id": tfds.features.Text(),
                "image": tfds.features.Image(shape=(32, 32, 3)),
                **labels,
            }
        ),
        supervised_keys=("image", "label"),
        homepage=_CIFAR_PAGE,
    )


def _cifar_splits(dataset: Dataset, coarse: dict[str, np.ndarray]) -> dict[str, Iterator[Example]]:
    def examples(split: str) -> Iterator[Example]:
        part = getattr(dataset, split)
        for index, (image, label) in enumerate(zip(part.images, part.labels, strict=True)):
            example = {
                "id": f"{split}_{index:05d}",
                "image": _png(Image.fromarray(image)),
                "label": int(label),
            }
            if coarse:
                example["coarse_label"] = int(coarse[split][index])
            yield index, example

    return {"train": examples("train"), "test": examples("test")}


def _as_rgb(content: bytes, name: str) -> bytes:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
            return content if image.mode == "RGB" else _png(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: unreadable image: {error}") from error


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=1)
    return stream.getvalue()
