"""A picture of what the model sees: images, augmented, attacked, and the perturbation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from agr_jax import sharding
from agr_jax.files import write_atomically
from agr_jax.runs.folder import PICTURE
from agr_jax.training.step import Trainer, TrainState

ROWS = ("image", "augmented", "adversarial", "perturbation x10")
_LEAST_SIDE = 96
_GAP = 4
_COLUMNS = 8
_CAPTION_HEIGHT = 16


def save_picture(
    folder: Path,
    trainer: Trainer,
    state: TrainState,
    batch: tuple[np.ndarray, np.ndarray],
    key: jax.Array,
    class_names: Sequence[str],
) -> None:
    """Saves the first images of a batch as a step sees them, in the run folder.

    Left out without Pillow, and for images that are neither grey nor in colour.

    Args:
        folder: the run folder.
        trainer: of the run.
        state: before the step.
        batch: images, uint8 [B, H, W, C], and labels.
        key: of the run, as the step gets it.
        class_names: by label.
    """
    count = -(-_COLUMNS // trainer.mesh.size) * trainer.mesh.size
    images, labels = (part[:count] for part in batch)
    if len(labels) < count or images.shape[-1] not in (1, 3):
        return
    where = sharding.batch_sharding(trainer.mesh)
    inputs = jax.jit(trainer.inputs)(state, *sharding.put((images, labels), where), key)
    content = batch_picture(
        images,
        sharding.get(inputs.images),
        sharding.get(inputs.adversarial),
        [class_names[label] for label in labels],
    )
    if content is not None:
        write_atomically(folder / PICTURE, content)


def batch_picture(
    images: np.ndarray,
    augmented: np.ndarray,
    adversarial: np.ndarray,
    captions: list[str] | None = None,
) -> bytes | None:
    """A PNG file of four rows, one column for each image, enlarged without smoothing.

    The last row is 0.5 + 10 (adversarial - augmented): grey is no change.

    Args:
        images: uint8 [N, H, W, C] with 1 or 3 channels.
        augmented: float [N, H, W, C] in [0, 1].
        adversarial: float [N, H, W, C] in [0, 1].
        captions: one for each column, such as class names.

    Returns:
        Content of the file, or `None` where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        return None
    perturbation = 0.5 + 10 * (adversarial - augmented)
    rows = [images, *(_bytes(row) for row in (augmented, adversarial, perturbation))]
    count, height, width, channels = images.shape
    scale = max(1, -(-_LEAST_SIDE // max(height, width)))
    height, width = scale * height, scale * width
    picture = Image.new(
        "RGB",
        (
            count * (width + _GAP) + _GAP,
            _CAPTION_HEIGHT + len(rows) * (height + _GAP + _CAPTION_HEIGHT),
        ),
        "white",
    )
    draw = ImageDraw.Draw(picture)
    for column, caption in enumerate(captions or []):
        draw.text((_GAP + column * (width + _GAP), 2), caption[: width // 6], fill="black")
    for number, (title, row) in enumerate(zip(ROWS, rows, strict=True)):
        top = _CAPTION_HEIGHT + number * (height + _GAP + _CAPTION_HEIGHT)
        draw.text((_GAP, top + 2), title, fill="black")
        for column, image in enumerate(row):
            pixels = image[..., 0] if channels == 1 else image
            tile = Image.fromarray(np.ascontiguousarray(pixels)).convert("RGB")
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (_GAP + column * (width + _GAP), top + _CAPTION_HEIGHT))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def _bytes(images: np.ndarray) -> np.ndarray:
    return np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
