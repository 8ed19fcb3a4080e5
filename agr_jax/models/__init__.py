"""Networks in Flax Linen, with the input normalisation inside.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from agr_jax import models
    >>> model = models.create("preactresnet18", num_classes=10, width=8)
    >>> variables = model.init(jax.random.key(0), jnp.zeros([1, 32, 32, 3]))
    >>> classifier = models.Classifier(model, variables)
    >>> classifier(jnp.zeros([2, 32, 32, 3])).shape
    (2, 10)
"""

from agr_jax.models._create import create
from agr_jax.models._from_config import check_trainable, from_config
from agr_jax.models.classifier import Classifier
from agr_jax.models.preact_resnet import PreActResNet
from agr_jax.models.pretrained import load_pretrained, pretrained_names
from agr_jax.models.wide_resnet import WideResNet

__all__ = [
    "Classifier",
    "PreActResNet",
    "WideResNet",
    "check_trainable",
    "create",
    "from_config",
    "load_pretrained",
    "pretrained_names",
]
