"""Shows what a sweep is about to do, and what it will cost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from src.common import terminal
from src.common.run_folder import RunFolder, read_metrics
from src.config.memory_estimate import vocab_size
from src.config.run_config import RunConfig
from src.config.variant_name import short_names
from src.model.size import Size
from src.run.resume import finished_record
from src.study.analysis.looks import ERROR_SHARES, LOSS
from src.study.analysis.power import detectable_prevention
from src.study.analysis.stats import ALPHA
from src.sweep.cluster import LAUNCHER
from src.sweep.cost import COMPILE_SECONDS, START_SECONDS, step_seconds
from src.sweep.plan import Cell, Plan, arms_by_baseline, is_aa_control

EXPECTED_SHARE = 0.95
"""The share of untreated runs that fail, for which a plan says what it can see."""


@dataclass
class Cost:
    """What is still to be trained for some runs."""

    runs: int = 0
    steps: int = 0
    shared_steps: int = 0
    tokens: int = 0
    flops: int = 0
    seconds: float | None = 0.0
    """Seconds if the jobs run one after the other; None if it cannot be estimated."""

    def add(self, other: "Cost") -> None:
        for field in ("runs", "steps", "shared_steps", "tokens", "flops"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        unknown = self.seconds is None or other.seconds is None
        self.seconds = None if unknown else (self.seconds or 0.0) + (other.seconds or 0.0)


class Estimator:
    """Measures size and step time of each distinct model shape once."""

    def __init__(self) -> None:
        self._sizes: dict[str, Size] = {}
        self._seconds: dict[str, float | None] = {}

    def size(self, config: RunConfig) -> Size:
        shape = repr(config.architecture)
        if shape not in self._sizes:
            self._sizes[shape] = config.architecture.measure(vocab_size=vocab_size(config))
        return self._sizes[shape]

    def cost(self, cell: Cell) -> Cost:
        config, recipe = cell.config, cell.config.recipe
        size = self.size(config)
        shape = repr((size, recipe.batch_size, recipe.accumulate, recipe.precision, config.trainer))
        if shape not in self._seconds:
            self._seconds[shape] = step_seconds(
                config, vocab_size=size.vocab_size, flops_per_token=size.flops_per_token
            )
        tokens = cell.own_steps * recipe.tokens_per_step
        seconds_per_step = self._seconds[shape]
        overhead = START_SECONDS + (COMPILE_SECONDS if config.compile else 0.0)
        return Cost(
            runs=1,
            steps=cell.own_steps,
            shared_steps=cell.first_step,
            tokens=tokens,
            flops=tokens * size.flops_per_token,
            seconds=None
            if seconds_per_step is None
            else overhead + seconds_per_step * cell.own_steps,
        )


def show_run(config: RunConfig) -> int:
    """Prints the configuration, size and cost of one run; returns the exit code."""
    terminal.say(yaml.safe_dump(config.plain(), sort_keys=False, allow_unicode=True))
    estimator = Estimator()
    size = estimator.size(config)
    cost = estimator.cost(Cell(config=config, arguments=[], baseline=None, added=False))
    time = "unknown" if cost.seconds is None else f"about {terminal.duration(cost.seconds)}"
    terminal.table(
        f"{config.folder}",
        ["", "value"],
        [
            ["parameters (active per token)", f"{size.params_total:,} ({size.params_active:,})"],
            ["steps to train", f"{cost.steps:,}"],
            ["tokens", f"{cost.tokens:,}"],
            ["FLOPs", f"{cost.flops:.2g}"],
            ["checkpoint, bytes", f"{size.checkpoint_bytes:,}"],
            [f"time on {config.trainer.device_type}", time],
        ],
    )
    if config.folder.is_dir() and finished_record(config, config.config_hash()) is not None:
        terminal.say(f"{config.folder} is already finished; type rerun=true to train it again")
    for note in config.notes:
        terminal.warn(note)
    return 0


def _data_of(config: RunConfig) -> str:
    return repr((config.data, config.tokenizer, config.recipe.seq_len))


def show_plan(plan: Plan, finished: Mapping[Path, bool]) -> None:
    """Prints one line per variant and the total cost."""
    groups: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        groups.setdefault(cell.config.variant_name, []).append(cell)
    # Data that are missing, or too few for a row, are refused before anything is said.
    for config in {_data_of(cell.config): cell.config for cell in plan.cells}.values():
        vocab_size(config)
    # Said first, because measuring the cost of many arms takes a while.
    launcher, n_jobs = plan.settings.launcher, plan.settings.n_jobs
    terminal.say(
        f"sweep of {len(plan.cells)} runs, {len(groups)} arms, n_jobs={n_jobs} on {launcher}, in"
        f" {plan.folder}"
    )
    shorts = short_names(list(groups))
    estimator, total, rows = Estimator(), Cost(), []
    for name, cells in groups.items():
        size, cost = estimator.size(cells[0].config), Cost()
        for cell in cells:
            if not finished[cell.folder]:
                cost.add(estimator.cost(cell))
        total.add(cost)
        rows.append(
            [
                f"{shorts[name]} (added)" if cells[0].added else shorts[name],
                f"{cost.runs} of {len(cells)}",
                f"{size.params_total:,} ({size.params_active:,})",
                f"{cost.steps:,}",
                f"{cost.shared_steps:,}",
            ]
        )
    variants = [cell.config.variant for cell in plan.cells]
    ffns, presets = (
        " and ".join(dict.fromkeys(getattr(variant, axis) for variant in variants))
        for axis in ("ffn", "preset")
    )
    terminal.table(
        f"study {plan.study} (ffn {ffns}, preset {presets}), sweep {plan.sweep_id}",
        ["variant", "runs to train", "parameters (active)", "steps", "shared steps"],
        rows,
    )
    _show_design(plan)
    begun = [c for c in plan.cells if not finished[c.folder] and RunFolder(c.folder).last.exists()]
    _show_total(plan, total, has_begun=bool(begun))
    for cell in plan.cells:
        if not finished[cell.folder] and _is_unmatched(cell, plan, finished):
            terminal.warn(
                f"{shorts[cell.config.variant_name]}: its loss cannot be compared with its"
                f" baseline's, because it ends at step {cell.config.last_step:,} and the finished"
                " baseline has not validated there; type rerun=true to train the baseline again"
            )


def _is_unmatched(cell: Cell, plan: Plan, finished: Mapping[Path, bool]) -> bool:
    """Whether a run ends early at a step where its finished baseline has no validation loss."""
    last = cell.config.last_step
    if cell.baseline is None or last == cell.config.recipe.max_steps or plan.rerun:
        return False
    baselines = [
        other
        for other in plan.cells
        if other.config.variant_name == cell.baseline and other.config.seed == cell.config.seed
    ]
    return any(
        finished[other.folder]
        and not any(
            line["step"] == last and "val/nonfinite_frac" in line
            for line in read_metrics(RunFolder(other.folder).metrics)
        )
        for other in baselines
    )


def _show_design(plan: Plan) -> None:
    """Says when a sequential sweep looks at its results, and which effect a sweep can see."""
    arms = arms_by_baseline([cell for cell in plan.cells if cell.config.remedies])
    if not arms:
        return
    baseline = max(arms, key=lambda name: len(arms[name]))
    seeds = {cell.config.seed for cell in plan.cells if cell.baseline == baseline}
    if plan.looks:
        sizes = ", ".join(str(len(look)) for look in plan.looks)
        terminal.say(
            f"sequential: looks after {sizes} seeds; an arm that is decided gets no further seeds,"
            " so this is the most that it can take"
        )
    if len(seeds) == 1:
        terminal.say(
            "1 seed shows differences without an interval; for an answer type seed=0,1,2,3,4,5"
        )
        return
    if plan.settings.primary == LOSS:
        terminal.say("about the final loss; what can be seen depends on how much seeds differ")
        return
    controls = [c for c in plan.cells if c.baseline == baseline and is_aa_control(c.config)]
    error = ERROR_SHARES[-1] if plan.looks else 1.0
    found = detectable_prevention(
        share=EXPECTED_SHARE,
        num_seeds=len(seeds),
        num_arm=1,
        num_untreated=1 + round(len(controls) / len(seeds)),
        bound=error * ALPHA / sum(map(len, arms.values())),
    )
    what = "no remedy, not even one that prevents all failures; type more seeds"
    if found is not None:
        what = f"a remedy that prevents {100 * found:.0f} % of the failures"
    elif not controls:
        what += ", or add stability=shaken_full"
    terminal.say(
        f"can be seen with 80 % power, if {100 * EXPECTED_SHARE:.0f} % of the untreated runs fail:"
        f" {what}"
    )


def _show_total(plan: Plan, total: Cost, *, has_begun: bool) -> None:
    if total.runs:
        n_jobs = plan.settings.n_jobs
        time = "time unknown"
        if total.seconds is not None:
            time = f"about {terminal.duration(total.seconds / n_jobs)} with n_jobs={n_jobs}"
            if has_begun:
                time = f"{time}, less for runs that were interrupted"
        terminal.say(
            f"to train: {total.runs} runs, {total.steps:,} steps, {total.tokens:,} tokens,"
            f" {total.flops:.2g} FLOPs, {time}; {total.shared_steps:,} steps come from saved states"
        )
        _warn_of_threads(plan)
    else:
        terminal.say("nothing to train: all runs are finished; type rerun=true to train them again")
    dropped: dict[str, list[str]] = {}
    for name in plan.dropped:
        variant, _, run = name.rpartition("/")
        dropped.setdefault(variant, []).append(run)
    for variant, runs in dropped.items():
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        repeating = "would repeat another run" if not more else "would repeat other runs"
        terminal.say(f"left out: {variant}/{runs[0]}{more} {repeating} bit by bit")
    for note in dict.fromkeys(note for cell in plan.cells for note in cell.config.notes):
        terminal.warn(note)


def _warn_of_threads(plan: Plan) -> None:
    """Warns if the jobs need more cores than there are: together they would take longer."""
    if plan.settings.launcher == LAUNCHER:
        return
    n_jobs, cores = plan.settings.n_jobs, os.cpu_count() or 1
    threads = max(cell.config.trainer.threads * cell.config.trainer.devices for cell in plan.cells)
    on_cpu = any(cell.config.trainer.device_type == "cpu" for cell in plan.cells)
    if on_cpu and n_jobs * threads > cores:
        terminal.warn(
            f"n_jobs={n_jobs} with {threads} threads each needs more than the {cores} cores of this"
            " machine, so the jobs will slow each other down"
        )
