"""A small saved model, as src.convert writes one."""

from pathlib import Path

from src.checkpoint.trained_model import TrainedModel
from src.conversion.write import write_checkpoint
from src.data.tokenizer import CharTokenizer
from src.model.architecture import ModelParts
from src.model.ffn.mlp import MLPConfig
from tests.builders import VOCAB, gqa_config, model_config, transformer


def saved_model(folder: Path) -> Path:
    """A gqa + mlp of characters."""
    parts = ModelParts(
        model=model_config(), attention=gqa_config(), ffn=MLPConfig(inner_dim=32), seq_len=16
    )
    made = TrainedModel(
        model=transformer(attention=parts.attention, ffn=parts.ffn),
        parts=parts,
        tokenizer=CharTokenizer("".join(map(chr, range(97, 97 + VOCAB)))),
        choices={"attention": "gqa", "ffn": "mlp", "model": "small"},
        step=0,
    )
    write_checkpoint(folder, made, with_weights=True, report={"settings": {}})
    return folder
