"""Which images were classified correctly, as a short text and back."""

import numpy as np
import pytest

from agr_jax.evaluation.packed_bits import decode_mask, encode_mask


@pytest.mark.parametrize("examples", [1, 7, 8, 9, 1000])
def test_masks_come_back(examples):
    mask = np.random.default_rng(0).random(examples) < 0.5
    np.testing.assert_array_equal(decode_mask(encode_mask(mask), examples), mask)
    with pytest.raises(ValueError, match="expected the bits of"):
        decode_mask(encode_mask(mask), examples + 8)
    with pytest.raises(ValueError, match="not the bits of a mask"):
        decode_mask("%%%", examples)
