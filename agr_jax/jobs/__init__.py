"""The jobs of the command line, by name."""

from agr_jax.jobs.command_line import JOBS

__all__ = ["JOBS"]
