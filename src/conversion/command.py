"""`python -m src.convert`."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from src import terminal
from src.conversion.convert import Converted
from src.conversion.convert import convert as convert_model
from src.conversion.llama import llama_config
from src.conversion.plan import Plan, plan
from src.conversion.source import read_source
from src.conversion.texts import Texts, cut, read_text
from src.conversion.write import write_checkpoint, write_huggingface, written_already
from src.errors import InputError
from src.model.size import measure
from src.restore import ModelParts
from src.trained import TrainedModel

FORMATS = ("checkpoint", "hf")
WEIGHTS = ("raw", "ema", "none")


def convert(given: Mapping[str, Any]) -> int:
    """Reads a source, converts it, shows what that lost, and writes it.

    Raises:
        InputError: any field is bad, before anything is written.
    """
    given = {**given, **{name: _option(given[name]) for name in ("attention", "ffn")}}
    _check(given)
    torch.set_num_threads(given["threads"])
    # Followed to where a link leads: a folder cannot be renamed onto a link.
    out = Path(given["out"]).resolve()
    kept = "raw" if given["weights"] == "none" else given["weights"]
    source = read_source(given["source"], weights=kept)
    todo = plan(source.parts, given)
    if given["to"] == "hf":
        llama_config(todo.target, end_ids=())
    text = None if given["calibration"] is None else read_text(given["calibration"])
    settings = {k: v for k, v in given.items() if k not in ("out", "source")}
    settings |= {"source_digest": _digest(source), "calibration_digest": _text_digest(text)}
    if written_already(out, settings):
        terminal.say(f"{out} holds this conversion already")
        return 0
    made, converted = _sizes_alone(source, todo), None
    if given["weights"] != "none":
        converted = _converted(source, todo, text, given)
        made = dataclasses.replace(made, model=converted.model)
    report = _report(given, settings, todo, converted)
    if given["to"] == "hf":
        write_huggingface(out, made, report=report)
    else:
        write_checkpoint(out, made, with_weights=given["weights"] != "none", report=report)
    _show(out, report)
    return 0


def _option(value: Any) -> Any:
    """A field that came past Hydra, which else makes nothing of null."""
    return None if value == "null" else value


def _check(given: Mapping[str, Any]) -> None:
    for field in ("source", "out"):
        if not isinstance(given[field], str):
            shown = "null" if given[field] is None else given[field]
            raise InputError(f"{field}={shown}: must be a place")
    if not isinstance(given["calibration"], str | None):
        raise InputError(f"calibration={given['calibration']}: must be one text, or null")
    for field, allowed in (
        ("to", FORMATS),
        ("weights", WEIGHTS),
        ("attention", (None, "gqa", "mlha")),
        ("ffn", (None, "mlp", "moe")),
    ):
        if given[field] not in allowed:
            shown = ", ".join("null" if entry is None else entry for entry in allowed)
            raise InputError(f"{field}={given[field]}: must be one of {shown}")
    for field, least in (("seed", 0), ("calibration_tokens", 1), ("threads", 1)):
        value = given[field]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError(f"{field}={value}: must be an integer of at least {least}")
    if given["to"] == "hf" and given["weights"] == "none":
        raise InputError("weights=none: is for to=checkpoint; others want weights")


def _sizes_alone(source: TrainedModel, todo: Plan) -> TrainedModel:
    """What comes out, but for its weights."""
    choices = dict(source.choices)
    if todo.latent is not None:
        choices["attention"] = "mlha"
    if todo.experts is not None:
        choices["ffn"] = "moe"
    return dataclasses.replace(source, parts=todo.target, choices=choices)


def _converted(
    source: TrainedModel, todo: Plan, text: str | None, given: Mapping[str, Any]
) -> Converted:
    texts: Texts | None = None
    if text is not None and todo.changes:
        texts = cut(
            text,
            source.tokenizer,
            field=f"calibration={given['calibration']}",
            num_tokens=given["calibration_tokens"],
            context=source.parts.seq_len,
        )
    num_layers = source.parts.model.num_layers
    if todo.changes:
        terminal.say(f"converting {num_layers} layers of {source.model.num_params():,} parameters")
    with terminal.counting("converting", total=num_layers, unit="layers") as count:
        return convert_model(source.model, todo, texts, seed=given["seed"], on_layer=count)


def _digest(source: TrainedModel) -> str:
    """A hash of all that the source brings."""
    facts = [repr(source.parts), source.tokenizer.state(), dict(source.choices)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in source.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _text_digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def _report(
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
    todo: Plan,
    converted: Converted | None,
) -> dict[str, Any]:
    """conversion.json."""
    loss = None if converted is None else converted.loss
    return {
        "source": given["source"],
        "settings": dict(settings),
        "cache_bytes_per_token": {
            "source": _cache_bytes(todo.source),
            "converted": _cache_bytes(todo.target),
        },
        "layers": [] if converted is None else converted.layers,
        "loss": None if loss is None else dataclasses.asdict(loss),
    }


def _cache_bytes(parts: ModelParts) -> int:
    assert parts.model.vocab_size is not None
    return measure(
        model=parts.model,
        attention=parts.attention,
        ffn=parts.ffn,
        vocab_size=parts.model.vocab_size,
        seq_len=parts.seq_len,
    ).cache_bytes_per_token


def _show(out: Path, report: Mapping[str, Any]) -> None:
    layers, loss = report["layers"], report["loss"]
    steps = list(layers[0]) if layers else []
    if steps:
        rows = [
            [str(number), *(terminal.number(lost[step], 2) for step in steps)]
            for number, lost in enumerate(layers)
        ]
        terminal.table(
            "Relative error of each layer's output after each step, on held-out text",
            ["layer", *steps],
            rows,
        )
    cache = report["cache_bytes_per_token"]
    if cache["source"] != cache["converted"]:
        terminal.say(
            f"KV cache, bytes a token: {cache['source']:,} before, {cache['converted']:,} after"
        )
    if loss is not None:
        terminal.say(
            f"loss on {loss['num_tokens']:,} held-out tokens: {loss['source']:.4f} before,"
            f" {loss['converted']:.4f} after; the largest difference of a logit:"
            f" {loss['max_logit_difference']:.2g}"
        )
    others = report["settings"]["to"] == "hf"
    use = "transformers loads it" if others else "src.generate takes it as run=, src.train as init="
    terminal.say(f"written to {out}; {use}")
