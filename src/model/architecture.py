"""What builds a model: this project's transformer, or a user's own model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from src.model.attention import AttentionConfig
from src.model.ffn import FeedForwardConfig
from src.model.size import Size, measure
from src.model.transformer import ModelConfig, build_model

GeneratorFor = Callable[[str], torch.Generator]


class Architecture(ABC):
    """Builds a model that maps token ids (B, T) to logits (B, T, V), and counts its size."""

    seq_len: int
    """The longest sequence, in tokens."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """The model's fixed vocabulary size; None if it follows the tokenizer."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, beginning with section and field, if values do not fit together."""

    @abstractmethod
    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """An initialised model on the CPU.

        Args:
            vocab_size: the vocabulary size.
            generator_for: returns the random stream for a parameter name.
        """

    @abstractmethod
    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """Parameter counts and costs."""

    def notes(self, model: nn.Module) -> list[str]:
        """Sentences about a built model that a reader of its results must know."""
        return []

    def facts(self) -> dict[str, Any]:
        """What the numbers depend on besides the configuration, as plain values."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelParts(Architecture):
    """The built-in transformer with one attention and one feed-forward option."""

    model: ModelConfig
    attention: AttentionConfig
    ffn: FeedForwardConfig
    seq_len: int

    @property
    def vocab_size(self) -> int | None:
        return self.model.vocab_size

    def check(self) -> None:
        try:
            self.attention.check(self.model.dims())
        except ValueError as error:
            raise ValueError(f"attention.{error}") from error

    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        return build_model(
            model=self.model,
            attention=self.attention,
            ffn=self.ffn,
            vocab_size=vocab_size,
            max_seq_len=self.seq_len,
            generator_for=generator_for,
        )

    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """Counts on the meta device; allocates no weights."""
        return measure(
            model=self.model,
            attention=self.attention,
            ffn=self.ffn,
            vocab_size=vocab_size,
            seq_len=self.seq_len,
            averaged_weights=averaged_weights,
        )
