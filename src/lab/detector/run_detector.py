"""The detector benchmark: trains missing runs, judges them and the public cases, prints scores."""

import contextlib
import io
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from nonfinite.lightning.early_warning import Thresholds
from src.cli.field_checks import choice, given_path, number
from src.common import terminal
from src.common.errors import InputError
from src.common.orphans import end_with
from src.common.run_folder import check_study, read_metrics
from src.common.storage import write_rows
from src.lab.detector.cases import CASES, QUICK, Case
from src.lab.detector.public_cases.case_list import PUBLIC_CASES
from src.lab.detector.public_table import SUMMARY, PublicTable
from src.lab.detector.score import misses, score
from src.lab.detector.thresholds import Outcome, try_all
from src.lab.detector.verdict import Verdict, judge, limited_metrics

MAX_JOBS = 1024

PLANTED, PUBLIC = "planted", "public"
"""The two parts of the benchmark, one of which `only` may name."""

HALVES = {"set": "seeds", "unseen": "unseen"}
"""The two halves, and the fields that hold their seeds."""


def detect(given: Mapping[str, Any]) -> int:
    """Runs the benchmark; returns the exit code.

    Raises:
        InputError: a field is invalid.
    """
    only = choice(given, "only", (None, PLANTED, PUBLIC))
    n_jobs = number(given, "n_jobs", int, least=1, most=MAX_JOBS)
    seeds = {half: _seeds(given, field) for half, field in HALVES.items()}
    common = set(seeds["set"]) & set(seeds["unseen"])
    if common:
        raise InputError(
            f"unseen={list(seeds['unseen'])}: must not contain {min(common)}, which is in seeds"
        )
    paths = {name: str(given_path(given, f"paths.{name}")) for name in ("runs", "cache")}
    study = str(given["study"])
    for case in CASES:
        check_study(f"{study}-{case.slug}")
    out = Path(paths["runs"]) / study if given["out"] is None else given_path(given, "out")
    if only != PUBLIC:
        _detect_planted(seeds, study=study, paths=paths, n_jobs=n_jobs, out=out / "results.csv")
    if only != PLANTED:
        _detect_public(out / "public.csv")
    return 0


def _detect_planted(
    seeds: Mapping[str, Sequence[int]],
    *,
    study: str,
    paths: Mapping[str, str],
    n_jobs: int,
    out: Path,
) -> None:
    """Trains and judges the planted failures and the healthy runs."""
    jobs = [(case, half, seed) for case in CASES for half, all_ in seeds.items() for seed in all_]
    folders = _train_all(jobs, study=study, paths=paths, n_jobs=n_jobs)
    verdicts = [
        judge(case, folder, half=half, seed=seed)
        for (case, half, seed), folder in zip(jobs, folders, strict=True)
    ]
    write_rows(out, [verdict.row() for verdict in verdicts])
    outcomes = try_all(
        [
            (verdict, limited_metrics(read_metrics(folder / "metrics.jsonl")), case.float_max)
            for verdict, folder, (case, half, _) in zip(verdicts, folders, jobs, strict=True)
            if half == "set"
        ]
    )
    _show(verdicts, outcomes)
    terminal.say(f"results: {out}")


def _detect_public(out: Path) -> None:
    """Runs the public failures under four tools."""
    # Here, because transformers, which one of the tools comes from, is installed for tests only.
    from src.lab.detector.compare_tools import compare_tools

    rows = []
    for count, public in enumerate(PUBLIC_CASES, start=1):
        rows.append(compare_tools(public))
        if count % 10 == 0 or count == len(PUBLIC_CASES):
            terminal.say(f"[{count}/{len(PUBLIC_CASES)}] public cases")
    write_rows(out, rows)
    table = PublicTable.read(out)
    terminal.table("public failures", SUMMARY, table.summary())
    terminal.say(f"results: {out}")


def _seeds(given: Mapping[str, Any], field: str) -> list[int]:
    value = given[field]
    is_list = isinstance(value, list) and value
    if not is_list or any(type(seed) is not int or seed < 0 for seed in value):
        raise InputError(f"{field}={value}: must be a list of seeds, such as [1000,1001]")
    if len(set(value)) < len(value):
        raise InputError(f"{field}={value}: contains a seed twice")
    return [int(seed) for seed in value]


def _train_all(
    jobs: Sequence[tuple[Case, str, int]], *, study: str, paths: Mapping[str, str], n_jobs: int
) -> list[Path]:
    """Trains the unfinished runs in parallel processes; returns all run folders."""
    folders: list[Path | None] = [None] * len(jobs)
    # Spawned, because torch's thread pool can hang in a forked process.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        n_jobs, mp_context=context, initializer=end_with, initargs=(os.getpid(),)
    ) as pool:
        waiting = {
            pool.submit(_train, case, seed=seed, study=study, paths=dict(paths)): place
            for place, (case, _, seed) in enumerate(jobs)
        }
        for count, done in enumerate(as_completed(waiting), start=1):
            folders[waiting[done]] = done.result()
            if count % 20 == 0 or count == len(jobs):
                terminal.say(f"[{count}/{len(jobs)}] runs")
    return [folder for folder in folders if folder is not None]


def _train(case: Case, *, seed: int, study: str, paths: Mapping[str, str]) -> Path:
    """Trains one run in a worker process; discards what it prints."""
    from src.common.override_grammar import quote_free_text
    from src.config.compose import compose
    from src.sweep.start import train

    arguments = [
        quote_free_text(argument)
        for argument in (
            *case.arguments,
            *QUICK,
            f"seed={seed}",
            f"study={study}-{case.slug}",
            f"paths.runs={paths['runs']}",
            f"paths.cache={paths['cache']}",
        )
    ]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = train(arguments)
    if code != 0:
        raise RuntimeError(f"{case.name}, seed {seed}: {said.getvalue().strip()[-500:]}")
    return compose("train", arguments).folder


def _show(verdicts: Sequence[Verdict], outcomes: Sequence[Outcome]) -> None:
    halves = {half: [v for v in verdicts if v.half == half] for half in HALVES}
    scores = {half: score(found) for half, found in halves.items()}
    columns = ["", "tuning seeds", "unseen seeds", "target"]
    rows = [
        [what, *(cell(scores[half]) for half in HALVES), target] for what, target, cell in METRICS
    ]
    terminal.table("detector", columns, rows)
    best = [o.thresholds for o in outcomes if o.rank == outcomes[0].rank]
    used = Thresholds()
    terminal.say(f"thresholds in use: {used}; best on the tuning seeds: {outcomes[0]}")
    if used not in best:
        terminal.warn(f"{len(best)} combinations of the grid are better on the tuning seeds")
    others = sum(v.alarm_step != v.alarm_in_run for v in verdicts)
    if others:
        terminal.warn(
            f"{others} runs were trained with other thresholds, and were warned at another step"
        )
    for line in misses(halves["unseen"]):
        terminal.say(f"missed: {line}")


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({part / whole:.0%})" if whole else "none"


METRICS = (
    ("drifting failures warned of", "90%", lambda s: _share(s.warned, s.drifting)),
    ("median lead, share of the run", "10%", lambda s: f"{s.median_lead:.0%}"),
    ("  of them not planted, warned of", "", lambda s: _share(s.natural_warned, s.natural)),
    ("  their median lead", "", lambda s: f"{s.natural_lead:.0%}"),
    ("sudden failures warned of", "", lambda s: _share(s.sudden_warned, s.sudden)),
    ("false alarms in healthy runs", "1 in 50", lambda s: _share(s.false_alarms, s.healthy)),
    ("incidents in healthy runs", "0", lambda s: _share(s.healthy_incidents, s.healthy)),
    ("first operation right", "95%", lambda s: _share(s.place_right, s.placed)),
    ("cause right", "", lambda s: _share(s.cause_right, s.incidents)),
    ("cause unknown", "", lambda s: _share(s.cause_unknown, s.incidents)),
    ("cause wrong", "2%", lambda s: _share(s.cause_wrong, s.incidents)),
    ("did not fail", "", lambda s: str(s.did_not_fail)),
)
"""Rows of the table: name, target, and the cell for a Score."""
