"""Studies whose failures are drawn instead of trained, analysed as others are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from src.study.analysis.analyse import arm_results
from src.study.analysis.looks import decision, num_untreated, seeds_by_look
from src.study.analysis.results import ArmResult
from src.study.read.collect import Run, Study

STEPS = 440
FAILS_AT = 308
"""The step at which a run fails, if it does: the median of the study `stability`."""

BASELINE, CONTROL = "none", "shaken_full"

Failures = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Design:
    """How many runs a study makes."""

    name: str
    num_arms: int
    num_seeds: int
    num_untreated: int | None
    """Untreated runs per seed, the baseline's included; None: what the undecided arms ask for."""
    is_sequential: bool
    stops: bool
    """Whether a run ends at its failure (guard.on_nonfinite=stop)."""

    @property
    def looks(self) -> list[list[int]]:
        """The seeds of each look."""
        seeds = list(range(self.num_seeds))
        return seeds_by_look(seeds) if self.is_sequential else [seeds]

    def untreated_for(self, num_arms: int) -> int:
        """The untreated runs per seed while so many arms are undecided."""
        return num_untreated(num_arms) if self.num_untreated is None else self.num_untreated


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one simulated study found, and what it cost."""

    found: list[int]
    """The arms that were called significantly different, by number."""
    num_runs: int
    cost: float
    """In complete runs."""


def simulate(design: Design, prevented: Sequence[float], share: float, *, seed: int) -> Outcome:
    """Draws the failures of a study and analyses it look by look.

    Args:
        design: its runs.
        prevented: by arm, the share of failures that it prevents; 0 for one without effect.
        share: the share of untreated runs that fail.
        seed: of the random numbers.
    """
    random = np.random.default_rng(seed)
    shares = share * (1 - np.array(prevented))
    arms = random.random((design.num_seeds, design.num_arms)) < shares
    most = design.untreated_for(design.num_arms)
    untreated = random.random((design.num_seeds, most)) < share
    runs: list[Run] = []
    is_open = list(range(design.num_arms))
    before = 0
    results: dict[int, ArmResult] = {}
    for look in design.looks:
        number = design.untreated_for(len(is_open))
        for each in range(before, len(look)):
            runs += [_run(f"arm{n}", each, 0, bool(arms[each, n])) for n in is_open]
            runs += _untreated(each, untreated[each, :number])
        before = len(look)
        results |= _results(runs, design)
        if design.is_sequential:
            is_open = [n for n in is_open if decision(results[n]) is None]
        if not is_open:
            break
    failed = sum(bool(run.nonfinite_steps) for run in runs)
    saved = failed * (1 - FAILS_AT / STEPS) if design.stops else 0.0
    return Outcome(
        found=[n for n, arm in results.items() if arm.comparisons["nonfinite"].detected],
        num_runs=len(runs),
        cost=len(runs) - saved,
    )


def _untreated(seed: int, failures: Failures) -> list[Run]:
    first, *others = map(bool, failures)
    controls = [_run(CONTROL, seed, repeat, fails) for repeat, fails in enumerate(others)]
    return [_run(BASELINE, seed, 0, first), *controls]


def _results(runs: Sequence[Run], design: Design) -> dict[int, ArmResult]:
    """The statistics of all arms, by number."""
    names = dict.fromkeys(run.variant for run in runs)
    study = Study(
        name="simulated",
        folder=Path("simulated"),
        runs=list(runs),
        sweeps=[],
        looks=dict.fromkeys(names, design.looks) if design.is_sequential else {},
    )
    return {
        int(arm.variant.removeprefix("arm")): arm
        for arm in arm_results(study)
        if arm.variant.startswith("arm")
    }


def _run(variant: str, seed: int, repeat: int, fails: bool) -> Run:
    role = "aa_control" if variant == CONTROL else "remedy"
    remedies = [] if variant == BASELINE else [variant]
    roles = {name: _role(role) for name in remedies}
    record: dict[str, Any] = {
        "status": "finished",
        "outcome": "stopped" if fails else "clean",
        "steps": FAILS_AT if fails else STEPS,
        "acts_from": 0,
        "roles": roles,
        "guard": {"nonfinite_steps": [FAILS_AT] if fails else []},
        "spikes": {"steps": []},
        "final": {},
    }
    run = Run(
        folder=Path("simulated") / variant / f"seed-{seed}",
        variant=variant,
        seed=seed,
        repeat=repeat,
        config=_config(variant),
        record=record,
        baseline=None if variant == BASELINE else BASELINE,
    )
    # Where a cached property keeps its value: there is no folder to read.
    run.__dict__["lines"] = []
    return run


def _role(role: str) -> Mapping[str, Any]:
    return {"role": role, "evaluated_as": None, "ends_early": False, "keeps_average": False}


def _config(variant: str) -> dict[str, Any]:
    choices = {"attention": "mlha", "ffn": "moe_writeup", "model": "stress", "preset": "stress"}
    return {
        "choices": {**choices, "stability": variant},
        "kinds": {"attention": "mlha", "ffn": "moe"},
        "stability": {} if variant == BASELINE else {variant: {}},
        "model": {},
        "recipe": {"max_steps": STEPS},
        "guard": {"on_nonfinite": "stop"},
    }
