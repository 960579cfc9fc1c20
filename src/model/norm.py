"""Root-mean-square layer normalisation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable


class RMSNorm(nn.Module):
    """RMSNorm (Zhang & Sennrich, arXiv 1910.07467, eq. 4): `x / rms(x) * weight`, last axis.

    Always computed in float32, even under autocast, because a mean of squares is inaccurate in
    bfloat16, whose significand has eight bits. The result has the dtype of the input.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` of shape (..., dim)."""
        trains_here = x.device.type == "cpu" and torch.is_grad_enabled()
        # torch.compile fuses the built-in operation, but cannot look into a custom Function.
        if trains_here and not torch.compiler.is_compiling():
            normed: Tensor = _NormOnCPU.apply(x.float(), self.weight.float(), self.eps)
        else:
            normed = F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.to(x.dtype)


class _NormOnCPU(torch.autograd.Function):
    """F.rms_norm with a custom backward pass; on CPUs PyTorch's takes many small operations."""

    # custom_fwd turns autocast off, which would compute the sums of products in bfloat16.
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        normed, scale, weight = ctx.saved_tensors
        # grad * normed serves both the mean over a row and the gradient of the weight.
        along = grad * normed
        mean = (along @ weight).unsqueeze(-1) / weight.shape[0]
        grad_x = torch.addcmul(grad * weight, normed, mean, value=-1).mul_(scale)
        return grad_x, along.reshape(-1, along.shape[-1]).sum(dim=0), None
