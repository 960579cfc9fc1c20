"""A Llama out of transformers.

python -m src.train model=external model.target=src.examples.llama:build preset=smoke
"""

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


class Logits(nn.Module):
    """A model of transformers that gives nothing but its logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.model(tokens_BT, use_cache=False).logits


def build(
    *,
    vocab_size: int,
    max_seq_len: int,
    hidden_dim: int = 64,
    num_layers: int = 4,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    inner_dim: int = 192,
) -> nn.Module:
    """A small one, initialised as transformers does it."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=max_seq_len,
        hidden_size=hidden_dim,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=inner_dim,
        tie_word_embeddings=True,
    )
    return Logits(LlamaForCausalLM(config))
