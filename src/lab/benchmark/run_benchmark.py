"""The benchmark command: checks its fields, measures, and prints tables or JSON lines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from src.cli.field_checks import choice, given_path, number
from src.common import terminal
from src.common.errors import InputError
from src.config.memory_estimate import predict_memory
from src.config.schema import MAX_THREADS
from src.lab.benchmark.contestants import CONTESTANTS, FLOOR, OURS, TRANSFORMERS, is_there
from src.lab.benchmark.race import Result, race
from src.lab.benchmark.shapes import CELLS, SHAPES, Case
from src.lab.benchmark.timings import TASKS
from src.training.recipe import MAX_COUNT, PRECISIONS

STEP = "step"


def bench(given: Mapping[str, Any]) -> int:
    """Measures every case; returns the exit code, 1 if a contestant failed.

    Raises:
        InputError: a field is invalid.
    """
    choice(given, "format", ("text", "json"))
    counts = {
        name: number(given, name, int, least=1, most=MAX_COUNT)
        for name in ("rounds", "steps", "warmup")
    }
    cases, names = _cases(given), _names(given)
    tasks = _listed(given, "tasks", (STEP, *TASKS))
    out = _out(None if given["out"] is None else given_path(given, "out"))
    failed: list[str] = []
    for case in cases:
        for task in tasks:
            try:
                rows, lines = _measure(case, task, names, counts)
            # The process of a contestant has ended with an error.
            except RuntimeError as error:
                rows, lines = [], [f"{case.shape}, {case.cell}, {task}: {error}"]
            failed += lines
            if rows:
                _report(case, rows, out, form=given["format"])
    for line in failed:
        terminal.warn(f"left out: {line}")
    return 1 if failed else 0


def _out(out: Path | None) -> Path | None:
    """The file for results, after a check that it can be written."""
    if out is None:
        return None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.open("a", encoding="utf-8").close()
    except OSError as error:
        raise InputError(f"out={out}: cannot be written ({error.strerror})") from error
    return out


def _measure(
    case: Case, task: str, names: Sequence[str], counts: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of a task, and an error line for each contestant that failed."""
    if task == STEP:
        found, failed = race(case, names, **counts)
        return _rows(case, found), failed
    timings = TASKS[task](case, rounds=counts["rounds"])
    return [asdict(timing) for timing in timings], []


def _report(case: Case, rows: Sequence[Mapping[str, Any]], out: Path | None, *, form: str) -> None:
    """Appends rows to the file, and prints them."""
    written = [json.dumps(row) for row in rows]
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in written)
    if form == "json":
        print(*written, sep="\n", flush=True)
    else:
        show = _show if rows[0]["task"] == STEP else _show_timings
        show(case, rows)


def _cases(given: Mapping[str, Any]) -> list[Case]:
    choice(given, "precision", PRECISIONS)
    device = choice(given, "device", ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = number(given, "threads", int, least=1, most=MAX_THREADS)
    batch_size = given["batch_size"]
    if batch_size is not None:
        batch_size = number(given, "batch_size", int, least=1, most=MAX_COUNT)
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


def _rows(case: Case, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The results with MFU, ratio to the floor, and predicted memory.

    MFU is the model's FLOPs (6 per active parameter, plus attention) over the machine's.
    """
    config, vocab_size = case.config(), case.sizes.vocab_size
    size = config.architecture.measure(vocab_size=vocab_size)
    predicted = None
    if any(result.name == OURS for result in results):
        memory = predict_memory(config, vocab_size=vocab_size)
        assert memory is not None
        # The GPU's allocator does not count the program's own memory.
        predicted = memory.step - (memory.program if case.device == "cuda" else 0)
    floor = next((r.tokens_per_second for r in results if r.name == FLOOR), None)
    return [
        {
            "task": STEP,
            **asdict(result),
            "mfu": size.flops_per_token * result.tokens_per_second / result.peak_flops,
            "of_floor": None if floor is None else result.tokens_per_second / floor,
            "predicted_bytes": predicted if result.name == OURS else None,
            "torch": torch.__version__,
            "gpu": torch.cuda.get_device_name() if case.device == "cuda" else None,
        }
        for result in results
    ]


def _show(case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = ["", "tokens/s", "rounds", "ms per step", "of floor", "MFU", "peak MiB"]
    columns += ["predicted", "start s", "CPU/wall"]
    cells = [
        [
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['least']:,.0f} to {row['greatest']:,.0f}",
            f"{1000 * case.tokens / row['tokens_per_second']:,.1f}",
            "-" if row["of_floor"] is None else f"{row['of_floor']:.2f}",
            f"{row['mfu']:.2f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
            "-" if row["predicted_bytes"] is None else f"{row['predicted_bytes'] / 2**20:,.0f}",
            f"{row['start_seconds']:.1f}",
            f"{row['cpu']:.2f}",
        ]
        for row in rows
    ]
    title = (
        f"{case.shape}, {case.cell}, {case.precision}, {case.device}, {case.tokens:,} tokens/step"
    )
    terminal.table(title, columns, cells)
    if case.device == "cpu" and any(row["cpu"] < 0.9 for row in rows):
        terminal.warn("other processes used the cores (CPU/wall below 0.9); compare ratios only")


def _show_timings(case: Case, rows: Sequence[Mapping[str, Any]]) -> None:
    first = rows[0]
    cells = [
        [
            row["name"],
            terminal.number(row["value"]),
            f"{terminal.number(row['least'])} to {terminal.number(row['greatest'])}",
            f"{row['value'] / first['value']:.3f}",
        ]
        for row in rows
    ]
    title = f"{case.shape}, {case.cell}, {case.precision}, {case.device}: {first['task']}"
    terminal.table(title, ["", first["unit"], "rounds", f"of {first['name']}"], cells)
