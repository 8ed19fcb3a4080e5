"""AutoAttack on CIFAR-10: a classifier that comes with the package, or a file of PyTorch weights.

Command: python examples/cifar10_autoattack.py --examples=100
         python examples/cifar10_autoattack.py --weights=FILE.safetensors --mean 0 --std 1
Data: CIFAR-10 from `TFDS_DATA_DIR`, `./data` or `~/tensorflow_datasets`, or else downloaded.
Cost: the first command took three and a half minutes on two slow CPU cores, compilation included.
"""

import argparse

import jax
import jax.numpy as jnp

from agr_jax import interop, models
from agr_jax.attacks import autoattack
from agr_jax.data import load_dataset, to_unit_range
from agr_jax.threat import Linf


def main(arguments: list[str] | None = None) -> None:
    """Evaluates the first test images and prints the robust accuracy after each attack."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="safetensors or npz; by default cifar10-width16-at")
    parser.add_argument("--mean", type=float, nargs="+", help="where the file does not say it")
    parser.add_argument("--std", type=float, nargs="+")
    parser.add_argument("--normalisation", choices=["fixed"], help="where the loader asks for it")
    parser.add_argument("--examples", type=int, default=1000, help="the first test images")
    parser.add_argument("--epsilon", type=float, default=8 / 255)
    parser.add_argument("--version", default="standard", help="or fast, which is not AutoAttack")
    parser.add_argument("--folder", help="what is done is kept here; the same command goes on")
    options = parser.parse_args(arguments)

    if options.weights:
        classifier = interop.load_torch_weights(
            options.weights, mean=options.mean, std=options.std, normalisation=options.normalisation
        )
    else:
        classifier = models.load_pretrained("cifar10-width16-at")
    test = load_dataset("cifar10", may_download=True, use_cache=True).test
    images = to_unit_range(jnp.asarray(test.images[: options.examples]))
    labels = test.labels[: options.examples]
    attack = autoattack(Linf(options.epsilon), version=options.version)
    result = attack.evaluate(classifier, images, labels, jax.random.key(0), folder=options.folder)
    print(result)


if __name__ == "__main__":
    main()
