"""Which images were classified correctly, as a short text: for paired tests of two runs."""

import base64
import binascii

import numpy as np


def encode_mask(mask: np.ndarray) -> str:
    """Booleans [N] as base64 of their bits."""
    return base64.b64encode(np.packbits(mask.astype(bool)).tobytes()).decode()


def decode_mask(text: str, examples: int) -> np.ndarray:
    """The booleans back.

    Raises:
        ValueError: not such a text, or of another length.
    """
    try:
        packed = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    except binascii.Error as error:
        raise ValueError(f"not the bits of a mask: {error}") from error
    if len(packed) != -(-examples // 8):
        raise ValueError(f"expected the bits of {examples} images, found {8 * len(packed)}")
    return np.unpackbits(packed, count=examples).astype(bool)
