"""From text and token files to batches."""

from src.data.batches import TrainBatches, ValBatches
from src.data.corpus import Corpus, DataConfig
from src.data.poison import PoisonConfig
from src.data.sources import SOURCES
from src.data.tokenizer import TOKENIZERS, Tokenizer, TokenizerConfig

__all__ = [
    "SOURCES",
    "TOKENIZERS",
    "Corpus",
    "DataConfig",
    "PoisonConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TrainBatches",
    "ValBatches",
]
