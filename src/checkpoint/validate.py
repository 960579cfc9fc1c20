"""Checks that a saved state holds everything that a rerun needs, before anything runs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from src.common.errors import InputError
from src.common.read_checkpoint import EMBEDDING, EXTERNAL
from src.data.tokenizer import restore_tokenizer
from src.model.attention import ATTENTIONS
from src.model.ffn import FEED_FORWARDS
from src.training.recipe import MATMUL_PRECISIONS


def check_state(saved: Mapping[str, Any], *, what: str) -> None:
    """Checks every field of a run's or incident's state that is used later without a check.

    Args:
        saved: the whole content of the file.
        what: field and value; the error line begins with them.

    Raises:
        InputError: a field is missing or malformed.
    """
    needed: dict[str, Callable[[Any], bool]] = {}
    if is_incident(saved):
        needed |= INCIDENT
        if "device" in saved:
            needed |= {"device": lambda value: value in ("cpu", "cuda")}
    elif is_run(saved):
        needed |= {"state_dict": _is_table, "global_step": _is_count}
    if is_run(saved):
        needed |= {"config": _is_config, "tokenizer": _is_tokenizer}
    if is_run(saved) and _is_config(saved["config"]) and not is_external(saved):
        needed |= {"state_dict": _has_embedding}
    for name, is_sound in needed.items():
        if name not in saved:
            raise InputError(f"{what}: is damaged: {name} is missing")
        if not is_sound(saved[name]):
            raise InputError(f"{what}: is damaged: {name} has unexpected content")


def is_run(saved: Mapping[str, Any]) -> bool:
    """Whether a file was written by a run of this project, as a checkpoint or an incident."""
    config = saved.get("config")
    return isinstance(config, dict) and {"kinds", "model", "recipe", "arguments"} <= set(config)


def is_incident(saved: Mapping[str, Any]) -> bool:
    """Whether the recorder wrote the file. It may lack some fields, and is damaged then."""
    return len(INCIDENT.keys() & saved.keys()) > len(INCIDENT) / 2


def is_external(saved: Mapping[str, Any]) -> bool:
    """Whether the model of a run is external."""
    return bool(saved["config"]["kinds"]["attention"] == EXTERNAL)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _has_embedding(value: Any) -> bool:
    rows = value.get(EMBEDDING) if isinstance(value, dict) else None
    # A converted model's file may hold only sizes.
    return value == {} or (_is_table(value) and isinstance(rows, Tensor) and rows.dim() == 2)


def _is_config(config: Any) -> bool:
    kinds, model, recipe = (config[name] for name in ("kinds", "model", "recipe"))
    if not all(isinstance(section, dict) for section in (kinds, model, recipe)):
        return False
    counts = [recipe.get(name) for name in ("seq_len", "batch_size", "accumulate")]
    if not all(_is_count(value) and value for value in counts):
        return False
    if not isinstance(recipe.get("precision"), str) or not isinstance(config["arguments"], list):
        return False
    if not isinstance(recipe.get("z_loss_weight"), int | float):
        return False
    if kinds.get("attention") == EXTERNAL:
        return isinstance(model.get("target"), str) and isinstance(model.get("kwargs"), dict)
    sections = [config.get("attention"), config.get("ffn")]
    known = kinds.get("attention") in ATTENTIONS and kinds.get("ffn") in FEED_FORWARDS
    return known and all(isinstance(section, dict) for section in sections)


def _is_tokenizer(state: Any) -> bool:
    try:
        restore_tokenizer(state)
    # A damaged state may raise anything; the tokenizers library raises bare Exceptions.
    except Exception:
        return False
    return True


def _is_record(value: Any) -> bool:
    fields = {"step", "line", "finding"}
    if not isinstance(value, dict) or not fields <= value.keys() or not _is_count(value["step"]):
        return False
    finding = value["finding"]
    named = {"module", "operation", "digest"}
    return finding is None or (isinstance(finding, dict) and named <= finding.keys())


def _are_entries(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_entry(entry) for entry in value)


def _is_entry(entry: Any) -> bool:
    fields = {"batch", "batch_idx", "rng", "cuda_rng", "router_state"}
    if not isinstance(entry, dict) or not fields <= entry.keys():
        return False
    rng, cuda_rng, router_state = (entry[name] for name in ("rng", "cuda_rng", "router_state"))
    return (
        isinstance(rng, Tensor)
        and rng.dtype == torch.uint8
        and rng.shape == torch.get_rng_state().shape
        and (cuda_rng is None or (isinstance(cuda_rng, Tensor) and cuda_rng.dtype == torch.uint8))
        and _is_table(router_state)
        and all(isinstance(tensor, Tensor) for tensor in router_state.values())
    )


INCIDENT: dict[str, Callable[[Any], bool]] = {
    "incident": _is_record,
    "state_dict": _is_table,
    "batches": _are_entries,
    "precision": lambda value: isinstance(value, str),
    "matmul_precision": lambda value: value in MATMUL_PRECISIONS,
    "threads": lambda value: _is_count(value) and value > 0,
    "router_values": lambda value: _is_table(value) and all(map(_is_table, value.values())),
}
"""The fields that the recorder writes, each with a function that checks its value."""


def recorded_device(state: Mapping[str, Any]) -> str:
    """cpu or cuda; cpu for incidents of earlier versions, which lack the field."""
    return str(state.get("device", "cpu"))
