"""Reads and writes model folders in Hugging Face's layout, without importing transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import tokenizers
from torch import Tensor

from src.common.errors import InputError
from src.conversion.llama_weights import LlamaFiles

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
GENERATION = "generation_config.json"
"""May name further tokens that end a text, besides those in config.json."""
INDEX = f"{WEIGHTS}.index.json"
"""Names the file of each weight, if the weights are in several files."""
END = "eos_token_id"
WANTED = (CONFIG, GENERATION, TOKENIZER, INDEX, "*.safetensors")
"""Files that are downloaded for a model on the hub."""


def read_folder(folder: Path, *, field: str) -> LlamaFiles:
    """Reads the model in a folder.

    Args:
        folder: a folder with config.json, tokenizer.json, and model.safetensors or its shards.
        field: field and value that the user typed, named in errors.

    Raises:
        InputError: a file is missing or damaged.
    """
    config = _json(folder / CONFIG, field=field)
    if (folder / GENERATION).is_file():
        more = _json(folder / GENERATION, field=field)
        config[END] = [*_as_list(config.get(END)), *_as_list(more.get(END))]
    return LlamaFiles(
        place=field,
        config=config,
        tensors=_tensors(folder, field=field),
        tokenizer=_tokenizer(folder / TOKENIZER, field=field),
    )


def _as_list(value: Any) -> list[Any]:
    """A list of a value that may be a single one, a list, or None."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _json(file: Path, *, field: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{field}: has no {file.name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{field}: {file.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{field}: {file.name} must hold an object")
    return content


def _tensors(folder: Path, *, field: str) -> dict[str, Tensor]:
    files = [folder / WEIGHTS]
    if not files[0].is_file() and (folder / INDEX).is_file():
        index = _json(folder / INDEX, field=field).get("weight_map")
        if not isinstance(index, dict):
            raise InputError(f"{field}: {INDEX} has no weight_map")
        files = [folder / str(name) for name in sorted(set(index.values()))]
    found: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            others = sorted(f.name for f in folder.glob("*.bin"))
            hint = (
                f"; {others[0]} is a pickle, which may run code and is not read" if others else ""
            )
            raise InputError(f"{field}: has no {file.name}{hint}")
        try:
            found |= safetensors.torch.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{field}: {file.name} is damaged ({error})") from error
    return found


def _tokenizer(file: Path, *, field: str) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise InputError(f"{field}: has no {file.name}")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"{field}: {file.name} cannot be read ({error})") from error


def write_folder(
    folder: Path,
    *,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tokenizer: tokenizers.Tokenizer | None,
) -> None:
    """Writes a model that transformers can load.

    Args:
        folder: an existing folder.
        config: content of config.json.
        tensors: weights by Llama's names.
        tokenizer: the tokenizer; None if the vocabulary is unknown.
    """
    safetensors.torch.save_file(dict(tensors), folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(str(folder / TOKENIZER))
        kind = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
        (folder / "tokenizer_config.json").write_text(kind + "\n", encoding="utf-8")
