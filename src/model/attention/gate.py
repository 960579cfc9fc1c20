"""A gate on the output of each attention head.

Axes: B batch, T time, D hidden, E = heads * head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.model.bounds import MeasuredPart


class OutputGate(nn.Linear, MeasuredPart):
    """`y * sigmoid(W x)`, elementwise (arXiv 2505.06708, eq. 5, position G1).

    Its weight is one Linear's, so that checkpoints hold `gate_proj.weight`.
    """

    gate_sum: Tensor
    num_gates: Tensor

    def __init__(self, *, hidden_dim: int, heads_dim: int) -> None:
        super().__init__(hidden_dim, heads_dim, bias=False)
        for name in ("gate_sum", "num_gates"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, y_BTE: Tensor, x_BTD: Tensor) -> Tensor:  # type: ignore[override]
        """Gates the joined outputs of all heads by the layer's own input."""
        gates_BTE = F.linear(x_BTD, self.weight).sigmoid()
        if self.training:
            with torch.no_grad():
                self.gate_sum += gates_BTE.sum(dtype=torch.float64)
                self.num_gates += gates_BTE.numel()
        return y_BTE * gates_BTE

    def stats(self) -> dict[str, Tensor]:
        """mean: the mean gate, 0.5 before training."""
        return {"mean": self.gate_sum / self.num_gates.clamp(min=1)}
