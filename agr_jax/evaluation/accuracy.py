"""Which images a network classifies correctly, clean or under an attack, in float32."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from agr_jax import sharding
from agr_jax.attacks import Attack
from agr_jax.attacks._attack import GradientAttack
from agr_jax.data import Split, to_unit_range
from agr_jax.data.batches import evaluation_batches
from agr_jax.errors import NonFiniteLossError
from agr_jax.journal import BatchRecord, Journal
from agr_jax.models import Classifier
from agr_jax.progress import Progress


def correct_under_attack(
    classifier: Classifier,
    attack: Attack | None,
    split: Split,
    *,
    seed: int,
    batch_size: int,
    mesh: Mesh,
    progress: Progress | None = None,
    journal: Journal | None = None,
    messages: list[str] | None = None,
) -> np.ndarray:
    """Which images are classified correctly after the attack.

    The attack's draws depend on the seed and on an image's position in the split alone, not on the
    batch size or the number of devices.

    Args:
        classifier: network with its variables.
        attack: `None` for the clean images.
        split: images and labels.
        seed: of the attack.
        batch_size: images at a time; the last batch is filled up with its last image.
        mesh: devices to share each batch.
        progress: advanced by one per batch.
        journal: of the batches that are done.
        messages: gets what makes the result unreliable.

    Returns:
        Booleans `[examples]`.

    Raises:
        NonFiniteLossError: if the attack's images, or the logits there, are NaN.
    """
    batch_size = min(batch_size, len(split.labels))
    root = jax.random.key(seed)
    masks, blind = [], 0
    for start, stop in evaluation_batches(len(split.labels), batch_size):
        rows = np.arange(start, stop)
        record = None if journal is None else journal.next("batch", rows)
        if record is not None:
            masks.append(~record.fooled)
            blind += int(record.zero_gradients)
            if progress is not None:
                progress.advance()
            continue
        started = time.perf_counter()
        # One program serves all batches.
        filled = sharding.filled_up(rows, batch_size, mesh)
        keys = jax.vmap(functools.partial(jax.random.fold_in, root))(filled)
        batch = sharding.put(
            (split.images[filled], split.labels[filled], keys), sharding.batch_sharding(mesh)
        )
        with jax.default_matmul_precision("float32"):
            found = sharding.get(_correct(attack, classifier, *batch))
        correct, defined, no_gradient = (part[: len(rows)] for part in found)
        if not defined.all():
            under = "no attack" if attack is None else type(attack).__name__
            raise NonFiniteLossError(
                f"images {start} to {stop - 1} under {under}: the network's logits, or their "
                "gradient, are NaN for some, which says nothing of its robustness"
            )
        masks.append(correct)
        zero_gradients = int(no_gradient.sum())
        blind += zero_gradients
        if journal is not None:
            seconds = time.perf_counter() - started
            record = BatchRecord.of_mask(rows, ~masks[-1], seconds, zero_gradients)
            journal.add("batch", record)
        if progress is not None:
            progress.advance()
    if blind and messages is not None:
        messages.append(
            f"the loss has no gradient where the attack starts, at {blind} of "
            f"{len(split.labels)} images: it is blind there; compare with square"
        )
    return np.concatenate(masks)


@functools.partial(jax.jit, static_argnums=0)
def _correct(
    attack: Attack | None,
    classifier: Classifier,
    images: jax.Array,
    labels: jax.Array,
    keys: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which images are right, where nothing is NaN, and where the attack began with no gradient."""
    inputs, no_gradient = to_unit_range(images), jnp.zeros_like(labels, bool)
    if isinstance(attack, GradientAttack):
        inputs, (no_gradient, _) = attack.look(classifier, inputs, labels, keys)
    elif attack is not None:
        inputs = attack(classifier, inputs, labels, keys)
    logits = classifier(inputs)
    defined = ~(jnp.isnan(inputs).reshape(len(labels), -1).any(1) | jnp.isnan(logits).any(1))
    return jnp.argmax(logits, axis=-1) == labels, defined, no_gradient
