"""The benchmark's fields, its table, and its lines of JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from src import terminal
from src.benchmark.contestants import CONTESTANTS, FLOOR, TRANSFORMERS, is_there
from src.benchmark.race import Result, race
from src.benchmark.shapes import CELLS, SHAPES, Case
from src.errors import InputError
from src.given import choice, number
from src.training.recipe import PRECISIONS


def bench(given: Mapping[str, Any]) -> int:
    """Races every case; returns the exit code, 1 where a contestant could not take part.

    Raises:
        InputError: a field is bad.
    """
    choice(given, "format", ("text", "json"))
    counts = {name: number(given, name, int, least=1) for name in ("rounds", "steps", "warmup")}
    cases, names = _cases(given), _names(given)
    out = None if given["out"] is None else Path(str(given["out"]))
    results: list[Result] = []
    failed: list[str] = []
    for case in cases:
        found, lines = race(case, names, **counts)
        results += found
        failed += lines
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(_plain(r, found)) + "\n" for r in found)
        for result in found if given["format"] == "json" else ():
            print(json.dumps(_plain(result, found)), flush=True)
        if given["format"] == "text":
            _show(case, found)
    for line in failed:
        terminal.warn(f"left out: {line}")
    return 1 if failed else 0


def _cases(given: Mapping[str, Any]) -> list[Case]:
    choice(given, "precision", PRECISIONS)
    device = choice(given, "device", ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: there is no GPU here")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = number(given, "threads", int, least=1)
    batch_size = given["batch_size"]
    if batch_size is not None:
        batch_size = number(given, "batch_size", int, least=1)
    return [
        Case(
            shape=shape,
            cell=cell,
            precision=given["precision"],
            device=device,
            threads=threads,
            batch_size=batch_size or SHAPES[shape].batch_size,
        )
        for shape in _listed(given, "shapes", tuple(SHAPES))
        for cell in _listed(given, "cells", tuple(CELLS))
    ]


def _names(given: Mapping[str, Any]) -> list[str]:
    if given["contestants"] is None:
        return [name for name in CONTESTANTS if is_there(name)]
    names = _listed(given, "contestants", CONTESTANTS)
    for name in names:
        if not is_there(name):
            raise InputError(f"contestants={names}: {name} needs the package {TRANSFORMERS}")
    return names


def _listed(given: Mapping[str, Any], field: str, allowed: Sequence[str]) -> list[str]:
    value = given[field]
    if not isinstance(value, list) or not value or any(entry not in allowed for entry in value):
        raise InputError(f"{field}={value}: must be a list of {', '.join(allowed)}")
    return list(dict.fromkeys(value))


def _plain(result: Result, race_: Sequence[Result]) -> dict[str, Any]:
    """Everything of a result, and its ratios within the race."""
    return {
        **asdict(result),
        "model_flops_utilization": _utilization(result),
        "of_floor": _ratio(result, _floor(race_)),
        "torch": torch.__version__,
    }


def _floor(results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.name == FLOOR), None)


def _ratio(result: Result, other: Result | None) -> float | None:
    return None if other is None else result.tokens_per_second / other.tokens_per_second


def _utilization(result: Result) -> float:
    """Operations of the model (6 an active parameter, and attention) over those of the machine."""
    config = result.case.config()
    size = config.architecture.measure(vocab_size=result.case.sizes.vocab_size)
    return size.flops_per_token * result.tokens_per_second / result.peak_flops


def _show(case: Case, results: Sequence[Result]) -> None:
    floor = _floor(results)
    rows = []
    for result in results:
        of_floor = _ratio(result, floor)
        rows.append(
            [
                result.name,
                f"{result.tokens_per_second:,.0f}",
                f"{result.least:,.0f} to {result.greatest:,.0f}",
                "-" if of_floor is None else f"{of_floor:.2f}",
                f"{_utilization(result):.2f}",
                f"{result.peak_bytes / 2**20:,.0f}",
                f"{result.start_seconds:.1f}",
                f"{result.cpu:.2f}",
            ]
        )
    columns = ["", "tokens/s", "rounds", "of floor", "MFU", "peak MiB", "start s", "CPU/wall"]
    title = (
        f"{case.shape}, {case.cell}, {case.precision}, {case.device}, {case.tokens:,} tokens a step"
    )
    terminal.table(title, columns, rows)
    if results and min(result.cpu for result in results) < 0.9 and case.device == "cpu":
        terminal.warn("others held the cores (CPU/wall below 0.9): only ratios mean anything")
