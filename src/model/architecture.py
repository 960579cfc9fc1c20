"""What a model is built from, whoever wrote it."""

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
    """Builds a model of token ids (B, T) to logits (B, T, V), and counts what it weighs."""

    seq_len: int
    """The longest sequence, in tokens."""

    @property
    @abstractmethod
    def vocab_size(self) -> int | None:
        """Tokens that it is fixed to; None where it takes as many as the tokenizer has."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, beginning with section and field, where something does not fit."""

    @abstractmethod
    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """An initialised model on the CPU.

        Args:
            vocab_size: tokens that it must know.
            generator_for: gives the random stream for a name.
        """

    @abstractmethod
    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """Sizes and costs."""

    def notes(self, model: nn.Module) -> list[str]:
        """What a reader of the result must know of a model that was built."""
        return []

    def facts(self) -> dict[str, Any]:
        """What its numbers hang on besides its configuration, as plain values."""
        return {}


@dataclass(frozen=True, kw_only=True)
class ModelParts(Architecture):
    """Our transformer with its attention and its feed-forward part."""

    model: ModelConfig
    attention: AttentionConfig
    ffn: FeedForwardConfig
    seq_len: int

    @property
    def vocab_size(self) -> int | None:
        """See Architecture."""
        return self.model.vocab_size

    def check(self) -> None:
        """See Architecture."""
        try:
            self.attention.check(self.model.dims())
        except ValueError as error:
            raise ValueError(f"attention.{error}") from error

    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """See Architecture."""
        return build_model(
            model=self.model,
            attention=self.attention,
            ffn=self.ffn,
            vocab_size=vocab_size,
            max_seq_len=self.seq_len,
            generator_for=generator_for,
        )

    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """See Architecture; builds nothing."""
        return measure(
            model=self.model,
            attention=self.attention,
            ffn=self.ffn,
            vocab_size=vocab_size,
            seq_len=self.seq_len,
            averaged_weights=averaged_weights,
        )
