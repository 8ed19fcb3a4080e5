"""Evaluation of trained networks: accuracy under attacks, its records, and their table."""

from agr_jax.evaluation.accuracy import correct_under_attack
from agr_jax.evaluation.evaluate import evaluate_run
from agr_jax.evaluation.table import render_table

__all__ = ["correct_under_attack", "evaluate_run", "render_table"]
