"""In-memory image data sets, checked when they are made, and class-balanced parts of them."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agr_jax.data.rows import RowReader
from agr_jax.errors import DataError

# Makes an array of a shape and dtype, in memory as `np.empty`, or on disk.
Allocate = Callable[[tuple[int, ...], Any], np.ndarray]

# Separate random streams, so that holding out and subsetting with one seed stay independent.
_SUBSET_STREAM = 0
_HOLD_OUT_STREAM = 1
# Of parts of a test split: the same for all runs, so that their results can be compared.
PART_SEED = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, H, W, C], 0..255, N >= 1.
        labels: int32 [N].

    Raises:
        DataError: another dtype, rank or length, or no images at all.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != np.uint8:
            found = f"{images.dtype}"
            if images.size and images.dtype.kind in "fiub":
                found += f" with values in [{images.min()}, {images.max()}]"
            hint = (
                "; give uint8 images (float images in [0, 1]: round(255 * images))"
                if images.dtype.kind == "f"
                else ""
            )
            raise DataError(f"images must be uint8 with values 0..255, found {found}{hint}")
        if images.ndim != 4:
            raise DataError(f"images must be [N, H, W, C], found shape {images.shape}")
        if labels.dtype != np.int32 or labels.ndim != 1:
            raise DataError(f"labels must be int32 [N], found {labels.dtype} {labels.shape}")
        if len(images) != len(labels):
            raise DataError(f"found {len(images)} images but {len(labels)} labels")
        if images.size == 0:
            raise DataError(f"a split must hold at least one image, found shape {images.shape}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Split":
        """Returns the examples at `indices` (int [M]), in that order.

        Of a mapped file, images are read when they are asked for.
        """
        if self._reader.is_file:
            return _Taken(self, indices)
        return Split(self.images[indices], self.labels[indices])

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A copy of some images (int [M]), without the memory of all where they are in a file."""
        return self._reader(rows)

    @functools.cached_property
    def _reader(self) -> RowReader:
        return RowReader(self.images)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(height, width, channels)`."""
        return self.images.shape[1:]

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return len(self) * math.prod(self.image_shape)

    @property
    def ordered_by_class(self) -> bool:
        """Whether the first examples are of few classes: those of one class are adjacent.

        So are those of an image folder. The official CIFAR, Tiny ImageNet and digits are mixed.
        """
        changes = float(np.mean(self.labels[1:] != self.labels[:-1])) if len(self) > 1 else 0.0
        shares = np.bincount(self.labels) / len(self)
        if_mixed = 1 - float(np.sum(shares**2))
        return bool((np.diff(self.labels) >= 0).all()) or changes < if_mixed / 2


class _Taken(Split):
    """Some examples of a split whose images are in a file; in memory only if all are asked for."""

    def __init__(self, whole: Split, rows: np.ndarray) -> None:
        object.__setattr__(self, "labels", whole.labels[rows])
        object.__setattr__(self, "_whole", whole)
        # Whatever picks rows of an array: numbers from the end, a mask, a slice.
        object.__setattr__(self, "_rows", np.arange(len(whole))[rows])
        if not len(self):
            raise DataError("a split must hold at least one image, found none")

    _whole: Split
    _rows: np.ndarray

    @functools.cached_property
    def images(self) -> np.ndarray:
        """All of them."""
        return self.read(np.arange(len(self)))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """From the file; see `Split.read`."""
        return self._whole.read(self._rows[rows])

    def take(self, indices: np.ndarray) -> Split:
        """Examples of these; see `Split.take`."""
        return self._whole.take(self._rows[indices])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(height, width, channels)`."""
        return self._whole.image_shape


@dataclass(frozen=True, eq=False)
class Part:
    """Some examples of a split that stand for all of it.

    Attributes:
        rows: int [M], ascending.
        of: number of the split's examples.
        drawn: whether they were drawn with `PART_SEED`, or are the first.
    """

    rows: np.ndarray
    of: int
    drawn: bool

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if len(self) == self.of:
            return f"all {self.of}"
        if self.drawn:
            return f"{len(self)} drawn with seed {PART_SEED} of {self.of}"
        return f"first {len(self)} of {self.of}"

    @property
    def suffix(self) -> str:
        """Of a file's name: empty for the whole split."""
        if len(self) == self.of:
            return ""
        return f"-{'drawn' if self.drawn else 'first'}{len(self)}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set held in memory.

    Attributes:
        name: as people write it, for example "CIFAR-10".
        class_names: one name per class; labels index it.
        train: training examples.
        test: test examples.
        validation: examples held out of the training set, or None.
        source: where it was read from.
        complete: False for a part of the official set.
        digests: `records_digest` of train and test as they were read, before any were held out or
            left out; empty where nobody took them.

    Raises:
        DataError: a label outside 0..num_classes-1, or splits of different image shapes.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    test: Split
    validation: Split | None
    source: str
    complete: bool
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        splits = {"train": self.train, "test": self.test, "validation": self.validation}
        for split_name, split in splits.items():
            if split is None:
                continue
            bad = np.flatnonzero((split.labels < 0) | (split.labels >= self.num_classes))
            if bad.size:
                raise DataError(
                    f"{self.name}: label {split.labels[bad[0]]} of {split_name} example {bad[0]} "
                    f"is outside 0..{self.num_classes - 1}"
                )
            if split.image_shape != self.image_shape:
                raise DataError(
                    f"{self.name}: {split_name} images are {split.image_shape}, "
                    f"train images are {self.image_shape}"
                )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image, (H, W, C)."""
        height, width, channels = self.train.image_shape
        return height, width, channels

    def as_dict(self) -> dict[str, Any]:
        """What to record of it: JSON values."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            "source": self.source,
            "complete": self.complete,
            "image_shape": list(self.image_shape),
            "class_names": list(self.class_names),
            "examples": {name: len(split) for name, split in splits.items() if split is not None},
            "digests": dict(self.digests),
        }

    def describe(self) -> str:
        """Returns one line: name, sizes, image shape, classes, source, [SUBSET] if partial."""
        sizes = f"{len(self.train):,} + {len(self.test):,}"
        held_out = "" if self.validation is None else f" (+ {len(self.validation):,} held out)"
        shape = "x".join(str(side) for side in self.image_shape)
        subset = "" if self.complete else " [SUBSET]"
        return (
            f"{self.name}: {sizes} images{held_out} of {shape}, {self.num_classes} classes, "
            f"from {self.source}{subset}"
        )


def representative_order(split: Split) -> np.ndarray:
    """All rows of a split, int [N], so that the first M of them stand for it, whatever M is.

    The split's own order, so that M examples are the first M, as the field uses CIFAR's; or, where
    that is by class, a draw with `PART_SEED`.
    """
    rows = np.arange(len(split))
    return np.random.default_rng(PART_SEED).permutation(rows) if split.ordered_by_class else rows


def part_of(split: Split, examples: int) -> Part:
    """The examples that stand for a split: the first, or drawn ones if it is ordered by class.

    Of two numbers of examples the smaller part is within the larger.

    Raises:
        DataError: fewer examples than one, or more than the split has.
    """
    if not 1 <= examples <= len(split):
        raise DataError(
            f"examples must be at least 1 and at most {len(split):,}, as many as there are, got "
            f"{examples:,}"
        )
    rows = np.sort(representative_order(split)[:examples])
    return Part(rows, of=len(split), drawn=split.ordered_by_class)


def class_balanced_subset(split: Split, examples: int, *, num_classes: int, seed: int) -> Split:
    """Draws `examples` examples without replacement, the same number from every class.

    Counts of two classes differ by at most one. The examples keep their order. The same seed gives
    the same subset, and a smaller subset is within a larger one.

    Raises:
        DataError: more examples than the split, or one of its classes, can give.
    """
    return split.take(_balanced_indices(split, examples, num_classes, (_SUBSET_STREAM, seed)))


def hold_out(split: Split, examples: int, *, num_classes: int, seed: int) -> tuple[Split, Split]:
    """Takes a class-balanced `examples` examples out of a split.

    Returns:
        (rest, held out): disjoint, together the whole split, each in the split's order.

    Raises:
        DataError: more examples than the split, or one of its classes, can give; nothing left.
    """
    indices = _balanced_indices(split, examples, num_classes, (_HOLD_OUT_STREAM, seed))
    if len(indices) == len(split):
        raise DataError(f"holding out all {examples:,} examples leaves none to train on")
    rest = np.delete(np.arange(len(split)), indices)
    return split.take(rest), split.take(indices)


def _balanced_indices(
    split: Split, examples: int, num_classes: int, seed: Sequence[int]
) -> np.ndarray:
    """Sorted indices, int [examples], of a class-balanced draw."""
    if examples < 1 or min(seed) < 0:
        raise DataError(f"examples must be >= 1 and seed >= 0, got {examples} and {seed[-1]}")
    if examples > len(split):
        raise DataError(f"asked for {examples:,} examples, but there are {len(split):,}")
    counts = np.bincount(split.labels, minlength=num_classes)
    if len(counts) > num_classes:
        raise DataError(f"found label {len(counts) - 1}, expected labels 0..{num_classes - 1}")
    base, extra = divmod(examples, num_classes)
    generator = np.random.default_rng(list(seed))
    order = generator.permutation(num_classes)
    # Classes that can spare one more example take the remainder.
    wanted = np.full(num_classes, base)
    wanted[[label for label in order if counts[label] > base][:extra]] += 1
    if (counts < wanted).any() or wanted.sum() < examples:
        scarcest = int(counts.argmin())
        largest = num_classes * counts[scarcest] + int((counts > counts[scarcest]).sum())
        raise DataError(
            f"asked for {examples:,} class-balanced examples ({base} or {base + 1} of each class), "
            f"but class {scarcest} has {counts[scarcest]}; ask for at most {largest:,}"
        )
    members = [generator.permutation(np.flatnonzero(split.labels == c)) for c in range(num_classes)]
    return np.sort(np.concatenate([members[c][: wanted[c]] for c in range(num_classes)]))
