"""SwiGLU's product of gate and up, with or without bounds.

Axes: any; the last is the inner width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from src.model.bounds import MeasuredPart


class SwiGLUClamp(MeasuredPart):
    """Bounds on the two factors: gate from above, up from both sides.

    Args:
        limit: the bound; above 0.
    """

    num_bound: Tensor
    num_entries: Tensor

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit
        # float64 counts every entry of a step exactly, and does not overflow as integers may.
        for name in ("num_bound", "num_entries"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up within the bounds, in the shapes and dtypes of the inputs."""
        if self.training:
            with torch.no_grad():
                bound = (gate > self.limit).sum() + (up.abs() > self.limit).sum()
                self.num_bound += bound
                self.num_entries += gate.numel() + up.numel()
        return gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)

    def stats(self) -> dict[str, Tensor]:
        """frac: the share of the entries of gate and up that were beyond a bound."""
        return {"frac": self.num_bound / self.num_entries.clamp(min=1)}


def swiglu(gate: Tensor, up: Tensor, clamp: SwiGLUClamp | None) -> Tensor:
    """`silu(gate) * up` (Shazeer, arXiv 2002.05202), after the bounds if there are any."""
    if clamp is not None:
        gate, up = clamp(gate, up)
    return F.silu(gate) * up
