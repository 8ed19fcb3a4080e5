"""Attacks a network that PyTorch trained, read from a file of PyTorch-named weights.

Command: python examples/pytorch_weights.py [WEIGHTS.safetensors --mean 0 0 0 --std 1 1 1]
"""

import argparse
import tempfile

import jax
import jax.numpy as jnp

from agr_jax import interop, models
from agr_jax.attacks import pgd
from agr_jax.losses import cross_entropy
from agr_jax.threat import Linf


def main(arguments: list[str] | None = None) -> None:
    """Attacks eight random images and prints what that does to the loss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", nargs="?", help="by default a random network is saved first")
    parser.add_argument("--mean", nargs="+", type=float, help="where the file does not say it")
    parser.add_argument("--std", nargs="+", type=float, help="as --mean")
    parser.add_argument("--normalisation", choices=["fixed"], help="where the loader asks for it")
    options = parser.parse_args(arguments)
    if options.path is None:
        options.path = tempfile.mkdtemp() + "/weights.npz"
        model = models.create("wrn10_1", num_classes=10, width=8, mean=(0.5,), std=(0.25,))
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros([1, 32, 32, 3]))
        interop.save_torch_weights(options.path, model, variables)

    classifier = interop.load_torch_weights(
        options.path, mean=options.mean, std=options.std, normalisation=options.normalisation
    )
    images = jax.random.uniform(jax.random.key(1), (8, 32, 32, 3))
    labels = classifier(images).argmax(-1)
    adversarial = pgd(Linf(8 / 255), steps=20)(classifier, images, labels, jax.random.key(2))
    before, after = (cross_entropy(classifier(x), labels).mean() for x in (images, adversarial))
    print(f"{options.path}: PGD-20 raised the loss from {before:.4f} to {after:.4f}")


if __name__ == "__main__":
    main()
