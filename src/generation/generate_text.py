"""The command `python -m src.generate`."""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from src.checkpoint.trained_model import load_trained
from src.cli.field_checks import choice, given_path, number
from src.common import terminal
from src.common.errors import InputError
from src.data.tokenizer import Tokenizer
from src.generation.decode import continue_prompts, without_end
from src.generation.prompts import encode, prompts_from
from src.generation.sampling import Sampling
from src.generation.stream import TextStream

FORMATS = ("text", "json")


def generate(given: Mapping[str, Any]) -> int:
    """Prints a continuation of each prompt; a single one is printed as it is generated.

    Raises:
        InputError: a field is invalid.
    """
    choice(given, "format", FORMATS)
    sampling = _sampling(given)
    max_new_tokens = number(given, "max_new_tokens", int, least=1)
    seed = number(given, "seed", int, least=0)
    prompts = prompts_from(
        _text(given["prompt"]),
        None if given["prompts_file"] is None else str(given_path(given, "prompts_file")),
    )
    trained = load_trained(given_path(given, "run"), weights=str(given["weights"]), field="run")
    model, tokenizer = trained.model, trained.tokenizer
    context = model.max_seq_len
    ids = [encode(place, text, tokenizer, context=context) for place, text in prompts]
    stream = None
    if given["format"] == "text" and len(ids) == 1:
        stream = TextStream(ids[0], tokenizer, write=_write)
    begin = time.perf_counter()
    found = continue_prompts(
        model,
        ids,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        end_ids=tokenizer.end_ids,
        on_token=None if stream is None else stream.add,
    )
    seconds = time.perf_counter() - begin
    if stream is not None:
        stream.finish()
        _write("\n")
        return _exit_code(prompts, found, tokenizer, max_new_tokens=max_new_tokens)
    texts = [
        tokenizer.decode(p + without_end(new, tokenizer.end_ids))
        for p, new in zip(ids, found, strict=True)
    ]
    if given["format"] == "json":
        print(json.dumps(_answer(prompts, texts, found, step=trained.step, seconds=seconds)))
        return 0
    for (_, prompt), text in zip(prompts, texts, strict=True):
        _write(f"--- {prompt}\n{text}\n\n")
    return _exit_code(prompts, found, tokenizer, max_new_tokens=max_new_tokens)


def _exit_code(
    prompts: Sequence[tuple[str, str]],
    found: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
) -> int:
    """Warns about texts that ended because of non-finite logits; returns the exit code, 0."""
    for (place, _), new in zip(prompts, found, strict=True):
        ended = len(new) > 0 and new[-1] in tokenizer.end_ids
        if len(new) < max_new_tokens and not ended:
            terminal.warn(f"{place}: logits became non-finite after {len(new)} tokens")
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
    num_tokens = sum(map(len, found))
    return {
        "step": step,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds if seconds else None,
        "samples": [
            {"prompt": prompt, "text": text, "tokens": list(new)}
            for (_, prompt), text, new in zip(prompts, texts, found, strict=True)
        ],
    }


def _sampling(given: Mapping[str, Any]) -> Sampling:
    try:
        return Sampling(
            temperature=number(given, "temperature", float),
            top_p=None if given["top_p"] is None else number(given, "top_p", float),
            top_k=None if given["top_k"] is None else number(given, "top_k", int),
            repetition_penalty=number(given, "repetition_penalty", float),
        )
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
