"""Exact tests: they need float64, which is a setting of the whole process.

`tests/test_float64.py` runs them in a process of their own; by hand it is
`JAX_ENABLE_X64=1 pytest tests/float64`.
"""

import jax

collect_ignore_glob = [] if jax.config.jax_enable_x64 else ["test_*.py"]
