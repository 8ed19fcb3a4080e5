"""The jobs of the command line, by name, and how it ends."""

from agr_jax.jobs.command_line import JOBS, Request
from agr_jax.jobs.ending import ending_with_one_line

__all__ = ["JOBS", "Request", "ending_with_one_line"]
