"""`python -m src.generate`."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src import terminal
from src.data.tokenizer import Tokenizer
from src.errors import InputError
from src.generation.decode import continue_prompts
from src.generation.prompts import encode, prompts_from
from src.generation.sampling import Sampling
from src.generation.stream import TextStream
from src.trained import load_trained

FORMATS = ("text", "json")


def generate(given: Mapping[str, Any]) -> int:
    """Writes a continuation of each prompt, as it is drawn where there is one prompt alone.

    Raises:
        InputError: any field is bad.
    """
    if given["format"] not in FORMATS:
        raise InputError(f"format={given['format']}: must be one of {', '.join(FORMATS)}")
    sampling = _sampling(given)
    max_new_tokens = _number(given, "max_new_tokens", int, least=1)
    seed = _number(given, "seed", int, least=0)
    prompts = prompts_from(_text(given["prompt"]), _text(given["prompts_file"]))
    writer = load_trained(Path(str(given["run"])), weights=str(given["weights"]), field="run")
    context = writer.model.max_seq_len
    ids = [encode(place, text, writer.tokenizer, context=context) for place, text in prompts]
    stream = None
    if given["format"] == "text" and len(ids) == 1:
        stream = TextStream(ids[0], writer.tokenizer, write=_write)
    begin = time.perf_counter()
    found = continue_prompts(
        writer.model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        end_ids=writer.tokenizer.end_ids,
        on_token=None if stream is None else stream.add,
    )
    seconds = time.perf_counter() - begin
    if stream is not None:
        stream.finish()
        _write("\n")
        return _done(prompts, found, writer.tokenizer, max_new_tokens=max_new_tokens)
    texts = [writer.tokenizer.decode(p + new) for p, new in zip(ids, found, strict=True)]
    if given["format"] == "json":
        print(json.dumps(_answer(prompts, texts, found, step=writer.step, seconds=seconds)))
        return 0
    for (_, prompt), text in zip(prompts, texts, strict=True):
        _write(f"--- {prompt}\n{text}\n\n")
    return _done(prompts, found, writer.tokenizer, max_new_tokens=max_new_tokens)


def _done(
    prompts: Sequence[tuple[str, str]],
    found: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
) -> int:
    """The exit code, once texts that were broken off are named."""
    for (place, _), new in zip(prompts, found, strict=True):
        ended = len(new) > 0 and new[-1] in tokenizer.end_ids
        if len(new) < max_new_tokens and not ended:
            terminal.warn(f"{place}: the logits stopped being finite after {len(new)} tokens")
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _answer(
    prompts: Sequence[tuple[str, str]],
    texts: Sequence[str],
    found: Sequence[Sequence[int]],
    *,
    step: int,
    seconds: float,
) -> dict[str, Any]:
    number = sum(map(len, found))
    return {
        "step": step,
        "seconds": seconds,
        "tokens_per_second": number / seconds if seconds else None,
        "samples": [
            {"prompt": prompt, "text": text, "tokens": list(new)}
            for (_, prompt), text, new in zip(prompts, texts, found, strict=True)
        ],
    }


def _sampling(given: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(
            temperature=_number(given, "temperature", float),
            top_p=None if given["top_p"] is None else _number(given, "top_p", float),
            top_k=None if given["top_k"] is None else _number(given, "top_k", int),
            repetition_penalty=_number(given, "repetition_penalty", float),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _number(given: Mapping[str, Any], field: str, kind: type, *, least: int | None = None) -> Any:
    value = given[field]
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits:
        shown = "null" if value is None else value
        raise InputError(f"{field}={shown}: must be {'an integer' if kind is int else 'a number'}")
    if least is not None and value < least:
        raise InputError(f"{field}={value}: must be at least {least}")
    return kind(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
