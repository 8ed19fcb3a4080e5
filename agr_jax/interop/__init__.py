"""Networks from PyTorch and to it: weight files, names of tensors, layouts.

Example:
    >>> from agr_jax.interop import load_torch_weights, save_torch_weights
"""

from agr_jax.interop.torch_weights import load_torch_weights, save_torch_weights

__all__ = ["load_torch_weights", "save_torch_weights"]
