"""The variants of a study as arms: each with its baseline, the compared steps and its role."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress

from src.config.variant_name import fields_of, without_common_folders
from src.study.analysis import endpoints
from src.study.analysis.endpoints import (
    Measure,
    Paired,
    Window,
    by_seed,
    clean_loss,
    nonfinite_tokens,
)
from src.study.analysis.looks import Looks, reached
from src.study.analysis.permutation import Pair
from src.study.read.collect import Run, Study

PARTS = ("attention", "ffn", "stability")
"""The parts that a variant's name begins with."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A variant with its runs, before its statistics."""

    variant: str
    label: str
    runs: list[Run]
    paired: Paired
    """Its runs and its baseline's; a baseline itself is paired with no runs."""
    censored_at: int | None
    """The step at which training ends early."""
    looks: Looks = ()
    """In a sequential study, the looks that the arm has reached."""

    @property
    def baseline(self) -> str | None:
        """The variant that the arm is compared with."""
        return self.runs[0].baseline

    @property
    def window(self) -> Window:
        """The steps that are compared."""
        return self.paired.window

    @cached_property
    def stability(self) -> str:
        """The names of its remedies."""
        return self.runs[0].axes["stability"]

    @property
    def is_aa_control(self) -> bool:
        """Whether the arm is the baseline, perturbed."""
        return self.runs[0].is_aa_control

    @property
    def measures(self) -> dict[str, Measure]:
        """By endpoint, what is counted inside the window or taken at its end."""
        return {
            "nonfinite": self.window.failed,
            "nonfinite_batches": self.window.num_nonfinite,
            "first_nonfinite": self.window.steps_until_nonfinite,
            "nonfinite_tokens": self._nonfinite_tokens,
            "spikes": self.window.num_spikes,
            "loss": self._loss,
        }

    def _loss(self, run: Run) -> float | None:
        return clean_loss(run, step=self.window.end)

    def _nonfinite_tokens(self, run: Run) -> float | None:
        return nonfinite_tokens(run, step=self.window.end)

    def pairs(self, endpoint: str) -> dict[int, Pair]:
        """Values by seed; if there are no steps to compare, only losses have any."""
        if self.window.is_empty and endpoint != "loss":
            return {}
        return self.paired.pairs(self.measures[endpoint])


def arms_of(study: Study) -> list[Arm]:
    """All arms, in the order of the sweep."""
    by_variant = {variant: study.of(variant) for variant in study.variants}
    ended = {variant: by_seed(runs) for variant, runs in by_variant.items()}
    names = labels({variant: runs[0] for variant, runs in by_variant.items()})
    arms = []
    for variant, runs in by_variant.items():
        baseline = ended.get(runs[0].baseline or "", {})
        censored_at = _censored_at(ended[variant])
        # Runs may differ in length: compare only the steps that all of them could make.
        sides = [
            run for side in (ended[variant], baseline) for each in side.values() for run in each
        ]
        planned = min((run.max_steps for run in sides), default=runs[0].max_steps)
        window = Window(
            start=max(run.acts_from for run in runs),
            end=planned if censored_at is None else min(planned, censored_at),
        )
        paired = Paired(arm=ended[variant], baseline=baseline, window=window)
        arms.append(
            Arm(
                variant=variant,
                label=names[variant],
                runs=runs,
                paired=paired,
                censored_at=censored_at,
                looks=reached(ended[variant], study.looks.get(variant, ())),
            )
        )
    return [_with_untreated(arm, arms) for arm in arms]


def _with_untreated(arm: Arm, arms: Sequence[Arm]) -> Arm:
    """The arm with the runs of its A/A control as further untreated runs."""
    control = matching_aa_control(arm, arms)
    if control is None or arm.is_aa_control:
        return arm
    return replace(arm, paired=replace(arm.paired, aa_control=control.paired.arm))


def _censored_at(runs: endpoints.Runs) -> int | None:
    ends = [
        run.steps
        for each in runs.values()
        for run in each
        if any(role["ends_early"] for role in run.roles.values())
        # A run that the guard ends, by stopping or by raising, has failed.
        and run.outcome not in ("stopped", "failed")
        and run.steps < run.max_steps
    ]
    return min(ends, default=None)


def matching_aa_control(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The A/A control of the same baseline that begins to act where the arm does, or just before.

    One that begins later would be the same run as the baseline in part of the compared steps. One
    that begins earlier does for an arm with a single run per seed: repeats of an arm share the
    steps before it acts, which runs of such a control do not. An A/A control is its own.
    """
    if arm.is_aa_control:
        return arm
    has_repeats = any(len(runs) > 1 for runs in arm.paired.arm.values())
    controls = [
        other
        for other in arms
        if other.is_aa_control
        and other.baseline == arm.baseline
        and other.window.start <= arm.window.start
        and not (has_repeats and other.window.start < arm.window.start)
    ]
    return max(controls, key=lambda control: control.window.start, default=None)


def labels(examples: Mapping[str, Run]) -> dict[str, str]:
    """Short names: the parts of attention, ffn and stability that vary, and fields if needed.

    Args:
        examples: one run of every variant.
    """
    axes = {name: [run.axes[axis] for axis in PARTS] for name, run in examples.items()}
    varied = [len({each[place] for each in axes.values()}) > 1 for place in range(len(PARTS))]
    parts = {name: "+".join(compress(each, varied)) for name, each in axes.items()}
    names = without_common_folders(examples)
    fields = {name: fields_of(names[name])[1:] for name in examples}
    everywhere = set.intersection(*map(set, fields.values())) if fields else set()
    shared = Counter(parts.values())
    short = {}
    for name in examples:
        own = [field for field in fields[name] if field not in everywhere]
        pieces = [parts[name]] if shared[parts[name]] == 1 else [parts[name], *own]
        # A variant in which nothing varies is named by its stability.
        short[name] = "@".join(filter(None, pieces)) or axes[name][-1]
    return short if len(set(short.values())) == len(short) else {name: name for name in examples}
