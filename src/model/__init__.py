"""The language model and its interchangeable parts. Imports nothing from the rest of `src`."""

from src.model.transformer import ModelConfig, Transformer, build_model

__all__ = ["ModelConfig", "Transformer", "build_model"]
