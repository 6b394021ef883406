"""Operators of InternImage: a PyTorch reference each, and kernels that are compiled on first use."""

from ops.dcnv3 import dcnv3

__all__ = ["dcnv3"]
