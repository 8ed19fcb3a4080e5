"""scikit-learn's handwritten digits: a small data set that needs no download."""

import numpy as np

from agr_jax.data.dataset import Dataset, Split
from agr_jax.errors import DataError

_TEST_EVERY = 5


def read_digits() -> Dataset:
    """Reads the digits that come with scikit-learn.

    Returns:
        uint8 [N, 8, 8, 1] images (0..16 scaled to 0..255) of 10 classes. Every fifth example of
        each class is a test example.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: scikit-learn is missing: pip install scikit-learn") from error
    bunch = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
    return Dataset(
        name="digits",
        class_names=tuple(str(label) for label in range(10)),
        train=Split(images[~is_test], labels[~is_test]),
        test=Split(images[is_test], labels[is_test]),
        validation=None,
        source="scikit-learn",
        complete=True,
    )
