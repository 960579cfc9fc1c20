"""Root-mean-square layer normalisation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4): `x / rms(x) * weight`, last axis.

    Always computed in float32, whatever autocast says, because the mean of squares loses most of
    bfloat16's eight bits; the result has the dtype of the input.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` of shape (..., dim)."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
