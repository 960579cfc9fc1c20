"""The command `python -m src.convert`."""

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
from src.conversion.texts import EMBEDDED, Texts, cut_windows, read_text
from src.conversion.write import atomic_folder, write_checkpoint, write_huggingface, written_already
from src.data.corpus import TextConfig
from src.model.architecture import ModelParts
from src.model.ffn.moe import MoEConfig
from src.model.size import BYTES_FLOAT32, measure

RULES = 1
"""Version of the conversion; increased when the same settings give different weights."""

FORMATS = ("checkpoint", "hf")
WEIGHTS = ("raw", "ema", "none")


def convert(given: Mapping[str, Any]) -> int:
    """Reads a source, converts it, shows the loss of accuracy, and writes the result.

    Raises:
        InputError: a field is invalid; raised before anything is written.
    """
    given = {**given, **{name: _option(given[name]) for name in ("attention", "ffn")}}
    _check(given)
    torch.set_num_threads(given["threads"])
    # Resolved, because a folder cannot be renamed onto a symbolic link.
    out = Path(given["out"]).resolve()
    kept = "raw" if given["weights"] == "none" else given["weights"]
    source = read_source(given["source"], weights=kept)
    # A run's default router and text are the defaults here, too.
    defaults = compose("train", ["ffn=moe", "data=shakespeare"])
    assert isinstance(defaults.ffn, MoEConfig) and isinstance(defaults.data, TextConfig)
    conversion = plan(source.parts, given, router=defaults.ffn.router)
    _check_size(conversion)
    if given["to"] == "hf":
        llama_config(conversion.target, end_ids=())
    measured = conversion.changes and given["weights"] != "none"
    _refuse_unused(given, conversion, measured=measured)
    text = None
    if measured and given["calibration"] is not None:
        text = read_text(given["calibration"], defaults.data)
    settings = {k: v for k, v in given.items() if k not in ("out", "source", "calibration")}
    digest = None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]
    settings |= {"source_digest": _digest(source), "calibration_digest": digest, "rules": RULES}
    if written_already(out, settings):
        terminal.say(f"{out} already holds this conversion")
        return 0
    with atomic_folder(out) as folder:
        made, converted = _without_weights(source, conversion), None
        if given["weights"] != "none":
            texts = None
            if text is not None:
                texts = cut_windows(
                    text,
                    source.tokenizer,
                    field=f"calibration={given['calibration']}",
                    val_frac=defaults.data.val_frac,
                    num_tokens=given["calibration_tokens"],
                    context=source.parts.seq_len,
                )
            converted = _converted(source, conversion, texts, seed=given["seed"])
            made = dataclasses.replace(made, model=converted.model)
        report = _report(given, settings, conversion, converted)
        if given["to"] == "hf":
            write_huggingface(folder, made, report=report)
        else:
            write_checkpoint(folder, made, with_weights=given["weights"] != "none", report=report)
    _show(out, report)
    return 0


def _check_size(conversion: Plan) -> None:
    """Raises InputError if the converted model does not fit into this machine's memory."""
    assert conversion.target.model.vocab_size is not None
    total = conversion.target.measure(vocab_size=conversion.target.model.vocab_size).params_total
    least = total * BYTES_FLOAT32
    if least > machine_bytes():
        raise InputError(
            f"the converted model would have {total:,} parameters and need {least / 2**30:,.0f}"
            f" GiB; this machine has {machine_bytes() / 2**30:,.0f} GiB; make the sizes smaller"
        )


def _refuse_unused(given: Mapping[str, Any], conversion: Plan, *, measured: bool) -> None:
    """Raises InputError if a typed field has no effect."""
    if given["seed"] != 0 and conversion.experts is None:
        raise InputError(f"seed={given['seed']}: has no effect without new routers; leave it out")
    if given["calibration"] not in (None, EMBEDDED) and not measured:
        raise InputError(
            f"calibration={given['calibration']}: has no effect, because no weights are converted;"
            " leave it out"
        )


def _option(value: Any) -> Any:
    """None for the text null, which Hydra does not convert in a field that is also a group."""
    return None if value == "null" else value


def _check(given: Mapping[str, Any]) -> None:
    for field in ("source", "out"):
        if not isinstance(given[field], str):
            raise InputError(f"{field}={shown(given[field])}: must be a path")
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
        raise InputError("weights=none: needs to=checkpoint, because to=hf writes weights")


def _without_weights(source: TrainedModel, conversion: Plan) -> TrainedModel:
    """The converted model's configuration, still with the source's weights."""
    choices = dict(source.choices)
    if conversion.latent is not None:
        choices["attention"] = "mlha"
    if conversion.experts is not None:
        choices["ffn"] = "moe"
    return dataclasses.replace(source, parts=conversion.target, choices=choices)


def _converted(
    source: TrainedModel, conversion: Plan, texts: Texts | None, *, seed: int
) -> Converted:
    num_layers = source.parts.model.num_layers
    if conversion.changes:
        terminal.say(f"converting {num_layers} layers of {source.model.num_params():,} parameters")
    with terminal.counting("converting", total=num_layers, unit="layers") as count:
        return convert_model(source.model, conversion, texts, seed=seed, on_layer=count)


def _digest(source: TrainedModel) -> str:
    """A hash of the source's configuration, tokenizer and weights."""
    facts = [repr(source.parts), source.tokenizer.state(), dict(source.choices)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in source.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().numpy().data)
    return digest.hexdigest()[:16]


def _report(
    given: Mapping[str, Any],
    settings: Mapping[str, Any],
    conversion: Plan,
    converted: Converted | None,
) -> dict[str, Any]:
    """The content of conversion.json."""
    loss = None if converted is None else converted.loss
    return {
        "source": given["source"],
        "settings": dict(settings),
        "cache_bytes_per_token": {
            "source": _cache_bytes(conversion.source),
            "converted": _cache_bytes(conversion.target),
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
            f"KV cache in bytes per token: {cache['source']:,} before, {cache['converted']:,} after"
        )
    if loss is not None:
        terminal.say(
            f"loss on {loss['num_tokens']:,} held-out tokens: {loss['source']:.4f} before,"
            f" {loss['converted']:.4f} after; largest difference of a logit:"
            f" {loss['max_logit_difference']:.2g}"
        )
    others = report["settings"]["to"] == "hf"
    use = (
        "load it with transformers" if others else "use it as src.generate run= or src.train init="
    )
    terminal.say(f"written to {out}; {use}")
