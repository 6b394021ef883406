"""Operators of InternImage: a PyTorch reference each, and kernels that are compiled on first use."""

from ops.dcnv3 import dcnv3
from ops.deformable_attention import deformable_attention

__all__ = ["dcnv3", "deformable_attention"]
