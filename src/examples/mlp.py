"""The smallest example: a language model of one hidden layer over the last few tokens.

    python -m src.train model=external model.target=src.examples.mlp:MLPLanguageModel preset=smoke

After Bengio et al., "A neural probabilistic language model" (JMLR 2003), equation 1, without its
direct connections. Axes: B batch, T time, D hidden, C context, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class MLPLanguageModel(nn.Module):
    """Predicts each token from the `context` tokens before it."""

    def __init__(
        self, *, vocab_size: int, context: int = 8, hidden_dim: int = 64, inner_dim: int = 256
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocab_size, hidden_dim)
        self.inner = nn.Linear(context * hidden_dim, inner_dim)
        self.head = nn.Linear(inner_dim, vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x_BTD = F.pad(self.embedding(tokens_BT), (0, 0, self.context - 1, 0))
        windows_BTDC = x_BTD.unfold(1, self.context, 1)
        return self.head(self.inner(windows_BTDC.flatten(2)).tanh())
