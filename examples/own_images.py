"""Adversarial training with AGR on your own images: a folder for each class.

The folder holds `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (or `val`; also png and webp). Images of
any size are resized and cropped to 64 x 64; the second start reads them from a cache.

Command: python launch.py --config=examples/own_images.py --config.data.dir=FOLDER
         --config.data.image_size=96, --config.data.resize=stretch, --config.epochs=100, ...
Cost: at 64 x 64 four times that of CIFAR for an image and step, 1.2e11 FLOP.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(profile: str = "paper") -> ConfigDict:
    """The paper's recipe at 64 x 64."""
    config = base.recipe("cifar10", "at", profile)
    config.name = "own_images"
    config.data.name = "image_folder"
    config.data.image_size = 64
    config.data.cutout_size = 32  # half a side, as in the paper
    config.data.crop_padding = 8
    return config
