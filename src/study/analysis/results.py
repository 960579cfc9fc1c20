"""What an analysis of a study says: the types that statistics fill and reports show."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its interval."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % interval; equal to the mean where there is one seed alone."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """Seeds with an event among seeds that could have had it."""

    events: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against its baseline, paired by seed, on one endpoint."""

    endpoint: str
    """nonfinite, nonfinite_batches, first_nonfinite, spikes or loss."""
    difference: Estimate | None
    """Arm minus baseline; None where no seed allows it, of loss fewer than two."""
    null_range: tuple[float, float] | None
    """Least and greatest difference that the null arm shows on single seeds, every run of it by
    itself; of nonfinite, in the share of seeds, by repeat. None without one."""
    p_value: float | None
    """Adjusted over the arms of the study; None where nothing could be tested."""
    smallest_p: float | None
    """The smallest p that this number of seeds could have reached; of nonfinite, adjusted."""
    smallest_effect: float | None
    """Of nonfinite, the smallest fall in the share that would be called if it were seen. Else the
    smallest mean difference, as a magnitude in units of the endpoint, that a paired t test of this
    arm alone would find 8 times of 10. None where none is."""
    verdict: str
    """A clause: what the comparison says, or that this design cannot tell."""
    detected: bool


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """All that a table says of one variant."""

    variant: str
    label: str
    """Short: the stability part, or what tells it from the others of its study."""
    baseline: str | None
    is_null: bool
    """Shaken by chance alone."""
    is_known_good: bool
    num_seeds: int
    num_runs: int
    outcomes: dict[str, int]
    """Runs by outcome."""
    acts_from: int
    """The step after which it is compared: until then its runs are bitwise the baseline's."""
    num_failed_before: int
    """Seeds that were non-finite before the arm could act; they are no part of its comparison."""
    censored_at: int | None
    """The step after which the arm does not train: its zeros are exposure, not effect."""
    nonfinite: Proportion
    """Seeds that went non-finite after `acts_from`; one with repeats as most of its runs did."""
    baseline_nonfinite: Proportion | None
    """The same of the baseline, from the same step on, on the same seeds."""
    nonfinite_batches: Estimate | None
    """After `acts_from`, per seed."""
    first_nonfinite: list[int]
    """The first such step of every seed among those events, in order of seeds."""
    spikes: Estimate | None
    """Spikes per seed after `acts_from`."""
    loss: Estimate | None
    """Final val/loss (of averaged weights for ema) of seeds that are clean."""
    loss_metric: str
    num_marked: int
    """Runs with val/nonfinite_frac above 0: their loss is a mean over the windows that are left,
    and stands in no comparison."""
    loss_at_equal: dict[str, float | None]
    """Mean loss of clean seeds by axis (steps, tokens, active_flops, seconds), each at the
    smallest total of any clean run of the study; None where the curve does not reach."""
    loss_difference_at_equal: dict[str, float | None]
    """The same minus the baseline's, over the seeds of which both are clean."""
    null_arm: str | None
    """The null arm that stands beside its differences, by label."""
    comparisons: dict[str, Comparison]
    """By endpoint; empty for a baseline."""
    tokens: float
    active_flops: float
    seconds: float
    """Cost of one run, mean; from nothing, whatever was shared. NaN where no record tells it."""
    own_steps: float
    """Steps of one run that were not taken from another's state, mean."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a study has shown."""

    study: str
    arms: list[ArmResult]
    """Baselines first, in the order of the sweep."""
    answer: list[str]
    """Sentences with which the report begins; the first is a warning where no arm can be ranked."""
    can_rank: bool
    """False where the known-good arm was not detected."""
    warnings: list[str]
    """What a reader must know: missing runs, mixed code versions, differing configurations."""
