"""The variants of a study as arms: whom each is compared with, over which steps, and as what."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

from src.config.variant_name import fields_of, without_common_folders
from src.study.analysis import endpoints
from src.study.analysis.endpoints import Measure, Paired, Window, by_seed, clean_loss
from src.study.analysis.permutation import Pair
from src.study.read.collect import Run, Study

PARTS = ("attention", "ffn", "stability")
"""Of which a variant's name begins."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A variant on its way to a result."""

    variant: str
    label: str
    runs: list[Run]
    paired: Paired
    """With the runs of its baseline; with none where it is one itself."""
    censored_at: int | None
    """The step after which it does not train."""

    @property
    def baseline(self) -> str | None:
        """The variant that it is compared with."""
        return self.runs[0].baseline

    @property
    def window(self) -> Window:
        """The steps that are compared."""
        return self.paired.window

    @cached_property
    def stability(self) -> str:
        """Its options, by name."""
        return self.runs[0].axes["stability"]

    @property
    def is_null(self) -> bool:
        """Whether chance alone sets it apart."""
        return self.runs[0].is_aa_control

    @property
    def measures(self) -> dict[str, Measure]:
        """What is counted inside the window, or stands at its end, by endpoint."""
        return {
            "nonfinite_batches": self.window.num_nonfinite,
            "first_nonfinite": self.window.steps_until_nonfinite,
            "spikes": self.window.num_spikes,
            "loss": self._loss,
        }

    def _loss(self, run: Run) -> float | None:
        return clean_loss(run, step=self.window.end)

    def pairs(self, endpoint: str) -> dict[int, Pair]:
        """Values by seed; without steps to compare, losses alone."""
        if self.window.is_empty and endpoint != "loss":
            return {}
        return self.paired.pairs(self.measures[endpoint])


def arms_of(study: Study) -> list[Arm]:
    """In the order of the sweep."""
    by_variant = {variant: study.of(variant) for variant in study.variants}
    ended = {variant: by_seed(runs) for variant, runs in by_variant.items()}
    names = labels({variant: runs[0] for variant, runs in by_variant.items()})
    arms = []
    for variant, runs in by_variant.items():
        baseline = ended.get(runs[0].baseline or "", {})
        censored_at = _censored_at(ended[variant])
        # Of runs that differ in length, the steps that both could make.
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
            )
        )
    return arms


def _censored_at(runs: endpoints.Runs) -> int | None:
    ends = [
        run.steps
        for each in runs.values()
        for run in each
        if any(role["ends_early"] for role in run.roles.values())
        # If the guard ends a run, by stopping or by raising, that is a failure.
        and run.outcome not in ("stopped", "failed")
        and run.steps < run.max_steps
    ]
    return min(ends, default=None)


def nearest_null(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The null arm of the same baseline that starts nearest to where the arm does.

    A null arm is its own: its range is that of its own runs.
    """
    if arm.is_null:
        return arm
    nulls = [other for other in arms if other.is_null and other.baseline == arm.baseline]
    start = arm.window.start
    return min(nulls, key=lambda null: abs(null.window.start - start), default=None)


def labels(examples: Mapping[str, Run]) -> dict[str, str]:
    """Short names: what of attention, ffn and stability varies; where that is not enough, fields.

    Args:
        examples: a run of every variant.
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
        # One that has nothing of its own is the plain one: its stability says so.
        short[name] = "@".join(filter(None, pieces)) or axes[name][-1]
    return short if len(set(short.values())) == len(short) else {name: name for name in examples}
