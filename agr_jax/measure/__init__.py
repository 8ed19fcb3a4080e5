"""What is measured on a checkpoint for the paper's figures, without training.

`boundary`: distances to the decision boundary along random directions (Figure 4). `landscape`:
losses along a random direction of the weights (Figure 5). `mechanism`: what an update along each
way of combining the gradients does to both losses, to first order (`docs/experiments.md`).
"""

from agr_jax.measure._boundary import boundary, steps_to_boundary
from agr_jax.measure._landscape import filter_normalised, gaussian_like, landscape
from agr_jax.measure._measure import measure_run
from agr_jax.measure._mechanism import mechanism

__all__ = [
    "boundary",
    "filter_normalised",
    "gaussian_like",
    "landscape",
    "measure_run",
    "mechanism",
    "steps_to_boundary",
]
