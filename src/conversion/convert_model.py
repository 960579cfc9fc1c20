"""`python -m src.convert`."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from src.checkpoint.trained_model import TrainedModel
from src.cli.field_checks import choice, number, shown
from src.common import terminal
from src.common.errors import InputError
from src.config.compose import compose
from src.config.memory_estimate import machine_bytes
from src.config.schema import MAX_THREADS
from src.conversion.conversion_plan import EXPERTS, LATENT, Plan, plan
from src.conversion.convert_weights import Converted
from src.conversion.convert_weights import convert as convert_model
from src.conversion.llama_weights import llama_config
from src.conversion.source import read_source
from src.conversion.texts import EMBEDDED, Texts, cut, read_text
from src.conversion.write import whole, write_checkpoint, write_huggingface, written_already
from src.data.corpus import TextConfig
from src.model.architecture import ModelParts
from src.model.ffn.moe import MoEConfig
from src.model.size import BYTES_FLOAT32, measure

RULES = 1
"""Number of the conversion's rules; raised when the same settings give other weights."""

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
    # What the defaults of a run say of experts and of the text.
    defaults = compose("train", ["ffn=moe", "data=shakespeare"])
    assert isinstance(defaults.ffn, MoEConfig) and isinstance(defaults.data, TextConfig)
    todo = plan(source.parts, given, router=defaults.ffn.router)
    _check_size(todo)
    if given["to"] == "hf":
        llama_config(todo.target, end_ids=())
    measured = todo.changes and given["weights"] != "none"
    _refuse_unused(given, todo, measured=measured)
    text = None
    if measured and given["calibration"] is not None:
        text = read_text(given["calibration"], defaults.data)
    settings = {k: v for k, v in given.items() if k not in ("out", "source", "calibration")}
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
    settings |= {"source_digest": _digest(source), "calibration_digest": digest, "rules": RULES}
    if written_already(out, settings):
        terminal.say(f"{out} holds this conversion already")
        return 0
    with whole(out) as folder:
        made, converted = _sizes_alone(source, todo), None
        if given["weights"] != "none":
            texts = None
            if text is not None:
                texts = cut(
                    text,
                    source.tokenizer,
                    field=f"calibration={given['calibration']}",
                    val_frac=defaults.data.val_frac,
                    num_tokens=given["calibration_tokens"],
                    context=source.parts.seq_len,
                )
            converted = _converted(source, todo, texts, seed=given["seed"])
            made = dataclasses.replace(made, model=converted.model)
        report = _report(given, settings, todo, converted)
        if given["to"] == "hf":
            write_huggingface(folder, made, report=report)
        else:
            write_checkpoint(folder, made, with_weights=given["weights"] != "none", report=report)
    _show(out, report)
    return 0


def _check_size(todo: Plan) -> None:
    """Raises InputError where what is to come out does not fit into this machine."""
    assert todo.target.model.vocab_size is not None
    total = todo.target.measure(vocab_size=todo.target.model.vocab_size).params_total
    least = total * BYTES_FLOAT32
    if least > machine_bytes():
        raise InputError(
            f"what is to be converted has {total:,} parameters, {least / 2**30:,.0f} GiB, and this"
            f" machine has {machine_bytes() / 2**30:,.0f}; make the sizes smaller"
        )


def _refuse_unused(given: Mapping[str, Any], todo: Plan, *, measured: bool) -> None:
    """Raises InputError where a field was typed that has nothing to act on."""
    if given["seed"] != 0 and todo.experts is None:
        raise InputError(f"seed={given['seed']}: is of new routers, ffn=moe from ffn=mlp alone")
    if given["calibration"] not in (None, EMBEDDED) and not measured:
        raise InputError(
            f"calibration={given['calibration']}: is for weights that are converted; nothing is"
            " here"
        )


def _option(value: Any) -> Any:
    """A field that came past Hydra, which else makes nothing of null."""
    return None if value == "null" else value


def _check(given: Mapping[str, Any]) -> None:
    for field in ("source", "out"):
        if not isinstance(given[field], str):
            raise InputError(f"{field}={shown(given[field])}: must be a place")
    if not isinstance(given["calibration"], str | None):
        raise InputError(f"calibration={given['calibration']}: must be one text, or null")
    choice(given, "to", FORMATS)
    choice(given, "weights", WEIGHTS)
    choice(given, "attention", (None, "gqa", "mlha"))
    choice(given, "ffn", (None, "mlp", "moe"))
    for field in (*LATENT, *EXPERTS):
        if given[field] is not None:
            number(given, field, int)
    for field, least in (("seed", 0), ("calibration_tokens", 1), ("threads", 1)):
        most = MAX_THREADS if field == "threads" else None
        number(given, field, int, least=least, most=most)
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


def _converted(source: TrainedModel, todo: Plan, texts: Texts | None, *, seed: int) -> Converted:
    num_layers = source.parts.model.num_layers
    if todo.changes:
        terminal.say(f"converting {num_layers} layers of {source.model.num_params():,} parameters")
    with terminal.counting("converting", total=num_layers, unit="layers") as count:
        return convert_model(source.model, todo, texts, seed=seed, on_layer=count)


def _digest(source: TrainedModel) -> str:
    """A hash of all that the source brings."""
    facts = [repr(source.parts), source.tokenizer.state(), dict(source.choices)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in source.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()[:16]


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
    bytes_per_token = measure(
        model=parts.model,
        attention=parts.attention,
        ffn=parts.ffn,
        vocab_size=parts.model.vocab_size,
        seq_len=parts.seq_len,
    ).cache_bytes_per_token
    assert bytes_per_token is not None
    return bytes_per_token


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
