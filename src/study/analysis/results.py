"""The results of an analysis: the types that the statistics fill and reports show."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its 95 % interval."""

    mean: float
    low: float
    high: float
    """Ends of the interval; equal to the mean if there is only one seed."""
    num_seeds: int


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """The number of runs that fail, and of all runs that were finite until the arm acts."""

    events: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against untreated runs of the same seeds, on one endpoint.

    Untreated are the runs of its baseline and those of the A/A control that matches it.
    """

    endpoint: str
    """nonfinite, nonfinite_batches, first_nonfinite, nonfinite_tokens, spikes or loss."""
    difference: Estimate | None
    """Arm minus untreated runs; None if no seed can be compared (for loss: fewer than two)."""
    aa_range: tuple[float, float] | None
    """Smallest and largest difference of the A/A control's single runs from the baseline; for
    nonfinite, the difference in the share of runs, by repeat. None without an A/A control."""
    p_value: float | None
    """Adjusted over the arms of the family; None if nothing could be tested."""
    smallest_p: float | None
    """The smallest unadjusted p that these runs could have given."""
    smallest_effect: float | None
    """What is detected with 80 % power, by simulation of the same test beside the other arms'
    results: for nonfinite, the smallest share of the failures that a remedy must prevent; for other
    endpoints the smallest mean difference, in units of the endpoint, if runs vary normally and as
    much as these. None if no effect would be."""
    seeds_for_half: int | None
    """For nonfinite, the number of seeds with which a remedy that prevents half of the failures is
    detected with 80 % power; None if unknown."""
    seeds_for_all: int | None
    """The same for a remedy that prevents all failures."""
    chance_if_halved: float | None
    """For nonfinite, the probability that so many runs fail if the arm prevents half of the
    failures; a small one rules that out."""
    verdict: str
    """A clause: what the comparison shows, or why it is inconclusive."""
    detected: bool


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """All that tables show of one variant."""

    variant: str
    label: str
    """A short name: the remedies, or whatever distinguishes the arm within its study."""
    baseline: str | None
    is_aa_control: bool
    is_positive_control: bool
    num_seeds: int
    num_runs: int
    outcomes: dict[str, int]
    """Runs by outcome."""
    acts_from: int
    """The step after which the arm is compared: until then its runs are bitwise the baseline's."""
    num_failed_before: int
    """Seeds that failed before the arm could act, which are left out of its comparison."""
    num_at_risk: int
    """The other seeds."""
    failure_correlation: float | None
    """The correlation of failures within a seed, over the untreated runs."""
    trains_alike: bool
    """Whether no step is compared, because it trains bitwise as its baseline does."""
    censored_at: int | None
    """The step at which training ends early: zero failures after it reflect fewer steps only."""
    num_looks: int
    """In a sequential study, the looks that the arm has reached; otherwise 0."""
    nonfinite: Proportion
    """Runs that went non-finite after `acts_from`."""
    untreated_nonfinite: Proportion | None
    """The same for the untreated runs, on the same seeds from the same step on."""
    nonfinite_batches: Estimate | None
    """After `acts_from`, per seed."""
    first_nonfinite: list[int]
    """The first non-finite step of every run counted in `nonfinite`, in order of seeds."""
    spikes: Estimate | None
    """Spikes per seed after `acts_from`."""
    loss: Estimate | None
    """Final validation loss (for ema, of the averaged weights) of the clean seeds."""
    loss_metric: str
    num_marked: int
    """Runs with val/nonfinite_frac above 0: their loss is a mean over the finite windows only, and
    is not compared."""
    loss_at_equal: dict[str, float | None]
    """Mean loss of the clean seeds at equal cost, by axis (steps, tokens, active_flops, seconds).
    The cost is the smallest total of any clean run of the study; None if the curve does not reach
    it."""
    loss_difference_at_equal: dict[str, float | None]
    """The same minus the baseline's, over the seeds that are clean in both."""
    aa_control: str | None
    """The label of the A/A control whose range is shown beside the differences."""
    comparisons: dict[str, Comparison]
    """By endpoint; empty for a baseline."""
    tokens: float
    active_flops: float
    seconds: float
    """Mean cost of one run from its first step, shared steps included. NaN if not recorded."""
    own_steps: float
    """Mean steps of one run that were not shared with another run."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The results of a study."""

    study: str
    arms: list[ArmResult]
    """Baselines first, in the order of the sweep."""
    answer: list[str]
    """The sentences that begin the report; the first is a warning if no arm can be ranked."""
    can_rank: bool
    """False if the effect of the positive control was not detected."""
    warnings: list[str]
    """Limits of the study: missing runs, mixed code versions, differing configurations."""
