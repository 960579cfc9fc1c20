"""A training loop of your own, watched: two lines are added, and the 51st batch makes it fail.

    python -m src.examples.plain_loop

One row of that batch is empty. Its vector has length 0, and is divided by its length.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nonfinite import watch


class Encoder(nn.Module):
    """Maps each row to a vector of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 32, bias=False)
        self.outer = nn.Linear(32, 8, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Vectors (B, 8) of rows (B, 16)."""
        vectors_BE = self.outer(self.inner(x_BD).relu())
        return vectors_BE / vectors_BE.norm(dim=-1, keepdim=True)


def main() -> None:
    torch.manual_seed(0)
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch(model, optimizer)
    for step in range(1, 101):
        x_BD = torch.randn(64, 16)
        if step == 51:
            x_BD[7] = 0.0
        vectors_BE = model(x_BD)
        loss = F.cross_entropy(vectors_BE @ vectors_BE.T / 0.1, torch.arange(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
