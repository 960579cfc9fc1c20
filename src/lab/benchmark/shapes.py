"""The timed cases: sizes of models and batches, and combinations of attention and ffn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from src.config.compose import compose
from src.config.run_config import RunConfig

CELLS = {
    "gqa+mlp": ("attention=gqa", "ffn=mlp"),
    # With norms on the latents, as in DeepSeek and the compared implementations.
    "mlha+moe": ("attention=mlha", "ffn=moe", "attention.latent_norm=true"),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model and of the batch in its timed step."""

    model: str
    """An option of conf/model."""
    vocab_size: int
    batch_size: int
    seq_len: int


SHAPES = {
    "proxy": Shape(model="proxy", vocab_size=256, batch_size=16, seq_len=128),
    "mid": Shape(model="small", vocab_size=4096, batch_size=8, seq_len=256),
    "smollm2_135m": Shape(model="smollm2_135m", vocab_size=49152, batch_size=1, seq_len=512),
    "smoldeepseek_916m": Shape(
        model="smoldeepseek_916m", vocab_size=49152, batch_size=1, seq_len=512
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One combination and shape, which every contestant trains."""

    shape: str
    cell: str
    precision: str
    """32-true or bf16-mixed."""
    device: str
    """cpu or cuda."""
    threads: int
    batch_size: int
    more: Sequence[str] = ()
    """Further arguments of the run."""

    @property
    def sizes(self) -> Shape:
        return SHAPES[self.shape]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.sizes.seq_len

    def arguments(self) -> list[str]:
        """Arguments of a run with this training step."""
        shape = self.sizes
        return [
            f"model={shape.model}",
            *CELLS[self.cell],
            f"model.vocab_size={shape.vocab_size}",
            f"recipe.batch_size={self.batch_size}",
            f"recipe.seq_len={shape.seq_len}",
            f"recipe.precision={self.precision}",
            f"trainer={'cpu' if self.device == 'cpu' else 'gpu'}",
            f"trainer.threads={self.threads}",
            *self.more,
        ]

    def config(self) -> RunConfig:
        return compose("train", self.arguments())
