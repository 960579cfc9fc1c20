"""The sentences with which a report begins."""

from collections.abc import Sequence

from src.common.number_format import p_equals, p_value, signed, steps
from src.study.analysis.answer_without_failures import (
    answer_without_failures,
    loss_sentences,
    nothing_fails,
)
from src.study.analysis.looks import LOSS, decision
from src.study.analysis.results import ArmResult, Comparison
from src.study.analysis.stats import ALPHA
from src.study.analysis.verdicts import MAX_NAMED, WORDS, fraction, listed
from src.study.read.collect import Study

PRIMARY = "nonfinite"


def reduces_failures(arm: ArmResult) -> bool:
    """Whether significantly fewer runs go non-finite than untreated ones."""
    primary = arm.comparisons.get(PRIMARY)
    return primary is not None and primary.detected and _change(primary) < 0


def rules_out_halving(arm: ArmResult) -> bool:
    """Whether so many runs fail that the arm does not prevent half of the failures."""
    primary = arm.comparisons.get(PRIMARY)
    chance = None if primary is None else primary.chance_if_halved
    return primary is not None and not primary.detected and chance is not None and chance <= ALPHA


def answer(
    study: Study, arms: Sequence[ArmResult], *, undetected: Sequence[ArmResult], num_controls: int
) -> list[str]:
    """What the study shows, in at most ten sentences.

    Args:
        study: the study, whose runs name router and preset.
        arms: all results.
        undetected: positive controls whose effect was not detected.
        num_controls: the number of all positive controls.
    """
    if not any(arm.num_seeds for arm in arms):
        nothing = "No run of this study has ended yet."
        return [*filter(None, [_cannot_rank(arms, undetected, num_controls)]), nothing]
    compared = [arm for arm in arms if arm.comparisons and not arm.is_aa_control]
    if nothing_fails(arms):
        more = [_sequential(study, compared), _censored(compared), _evaluated_differently(compared)]
        return [*answer_without_failures(study, arms), *loss_sentences(arms), *filter(None, more)]
    tested = [arm for arm in compared if arm.comparisons[PRIMARY].p_value is not None]
    is_about_loss = study.primary == LOSS
    sentences = [
        *(loss_sentences(arms) if is_about_loss else ()),
        _cannot_rank(arms, undetected, num_controls),
        _failures(study, arms),
        _significant("fewer", [arm for arm in tested if reduces_failures(arm)]),
        _significant("more", [arm for arm in tested if _adds_failures(arm)]),
        _ruled_out([arm for arm in tested if rules_out_halving(arm)]),
        _inconclusive([arm for arm in tested if _is_open(arm)]),
        _sequential(study, compared),
        _censored(compared),
        _evaluated_differently(compared),
        None if is_about_loss else _losses(arms, compared),
    ]
    return [sentence for sentence in sentences if sentence is not None]


def _adds_failures(arm: ArmResult) -> bool:
    return arm.comparisons[PRIMARY].detected and not reduces_failures(arm)


def _is_open(arm: ArmResult) -> bool:
    return not arm.comparisons[PRIMARY].detected and not rules_out_halving(arm)


def _change(comparison: Comparison) -> float:
    return 0.0 if comparison.difference is None else comparison.difference.mean


def _cannot_rank(
    arms: Sequence[ArmResult], undetected: Sequence[ArmResult], num_controls: int
) -> str | None:
    if not undetected:
        return None
    labels = {arm.variant: arm.label for arm in arms}
    against = dict.fromkeys(labels.get(str(arm.baseline), "its baseline") for arm in undetected)
    where = f" against {listed(against)}" if len(undetected) < num_controls else ""
    kind = "the positive control" if len(undetected) == 1 else "the positive controls"
    counts = listed(map(_with_counts, undetected))
    return (
        f"Too few failures to rank remedies{where}: even {counts}, {kind}, cannot be distinguished"
        f" from chance.{_more_seeds(undetected)}"
    )


def _more_seeds(undetected: Sequence[ArmResult]) -> str:
    """Advice, if more seeds would help."""
    needed = [n for arm in undetected if (n := arm.comparisons[PRIMARY].seeds_for_all) is not None]
    seeds = [arm.num_at_risk for arm in undetected]
    if not needed or max(needed) <= max(seeds):
        return ""
    return f" Run at least {max(needed)} seeds: 'seed=range({max(needed)})'."


def _failures(study: Study, arms: Sequence[ArmResult]) -> str:
    """What fails in the arms that have no baseline, and in their A/A controls."""
    ended = [arm for arm in arms if arm.num_seeds]
    shown = [arm for arm in ended if arm.baseline is None] or ended
    clauses = []
    for arm in shown[:MAX_NAMED]:
        run = study.of(arm.variant)[0]
        where = f"{run.composition} at preset {run.axes['preset']}"
        name = f"With {where}" if len(shown) == 1 else f"{arm.label} (with {where})"
        first = f", first at step {steps(arm.first_nonfinite)}" if arm.first_nonfinite else ""
        controls = [a for a in ended if a.is_aa_control and a.baseline == arm.variant]
        same = "".join(
            f"; repeated untreated, {fraction(other.nonfinite)} (A/A control {other.label})"
            for other in controls[:1]
            if other.nonfinite.total
        )
        clauses.append(f"{name}: {fraction(arm.nonfinite)} runs go non-finite{first}{same}")
    rest = len(shown) - MAX_NAMED
    more = f"; {rest} more in the table" if rest > 0 else ""
    return f"{'; '.join(clauses)}{more}."


def _significant(word: str, arms: Sequence[ArmResult]) -> str | None:
    if not arms:
        return None
    return f"Significantly {word} runs fail with {_against(arms)}{_p_range(arms)}."


def _ruled_out(arms: Sequence[ArmResult]) -> str | None:
    if not arms:
        return None
    largest = max(arm.comparisons[PRIMARY].chance_if_halved or 0.0 for arm in arms)
    who, one = ("It does", "it") if len(arms) == 1 else ("These do", "one of them")
    return (
        f"{who} not prevent even half of the failures: {_against(arms)}; if {one} did, so many"
        f" would fail with a chance of at most {100 * largest:.1f} %{''.join(_secondary(arms))}."
    )


def _sequential(study: Study, compared: Sequence[ArmResult]) -> str | None:
    """At which looks arms were decided, if the study is sequential."""
    looks = next(iter(study.looks.values()), None)
    if looks is None:
        return None
    reached = {arm.num_looks for arm in compared}
    sizes = [str(len(look)) for look in looks]
    early = [arm for arm in compared if arm.num_looks < len(looks)]
    stopped = [arm for arm in early if decision(arm, study.primary)]
    after = "; ".join(
        f"{listed(a.label for a in stopped if a.num_looks == number)} after {sizes[number - 1]}"
        for number in sorted(reached)
        if any(a.num_looks == number for a in stopped)
    )
    decided = f" Decided early, and not trained further: {after} seeds." if stopped else ""
    by = " by their loss" if study.primary == LOSS else ""
    p = f"p accounts for all {len(looks)} looks"
    return f"Looked at{by} after {listed(sizes)} seeds; {p}.{decided}"


def _inconclusive(unknown: Sequence[ArmResult]) -> str | None:
    """Arms that are not significantly different from the untreated runs, and what more would take.

    One seed is shown as it is: it gives no interval and no p.
    """
    if not unknown:
        return None
    names = listed(f"{arm.label} ({fraction(arm.nonfinite)})" for arm in unknown)
    if max(arm.num_seeds for arm in unknown) == 1:
        return (
            f"Failing runs with 1 seed, too few to tell: {names}. For an answer type the same"
            " command with 6 seeds or more: seed=0,1,2,3,4,5."
        )
    return (
        "Cannot tell whether fewer runs fail with"
        f" {names}{_p_range(unknown)}{''.join(_secondary(unknown))}.{_to_see_half(unknown)}"
    )


def _to_see_half(unknown: Sequence[ArmResult]) -> str:
    """How many seeds would show a remedy that prevents half of the failures, and their cost."""
    if any(arm.untreated_nonfinite and not arm.untreated_nonfinite.events for arm in unknown):
        return ""
    needed = [n for arm in unknown if (n := arm.comparisons[PRIMARY].seeds_for_half) is not None]
    if not needed or max(needed) <= max(arm.num_seeds for arm in unknown):
        return ""
    seconds = max(needed) * sum(arm.seconds * arm.num_runs / arm.num_seeds for arm in unknown)
    cost = f" ({seconds / 60:.0f} minutes for these arms)" if seconds > 60 else ""
    who = unknown[0].label if len(unknown) == 1 else "one of them"
    return (
        f" To find out whether {who} prevents half of the failures, type the same command with"
        f" 'seed=range({max(needed)})'{cost}; finished runs count."
    )


def _secondary(unknown: Sequence[ArmResult]) -> list[str]:
    """The secondary endpoints in which such arms are significantly different."""
    clauses = []
    for endpoint in ("nonfinite_batches", "nonfinite_tokens", "spikes"):
        for sign, word in zip((-1, 1), WORDS[endpoint][:2], strict=True):
            changed = [
                arm
                for arm in unknown
                if (found := arm.comparisons.get(endpoint)) is not None
                and found.detected
                and sign * _change(found) > 0
            ]
            if changed:
                names = listed(arm.label for arm in changed)
                clauses.append(f"; {word} with {names}{_p_range(changed, endpoint)}")
    return clauses


def _censored(compared: Sequence[ArmResult]) -> str | None:
    early = [arm for arm in compared if arm.censored_at is not None]
    if not early:
        return None
    names = listed(f"{arm.label} after step {arm.censored_at}" for arm in early)
    return (
        f"Censored, because training ends early: {names}; zero failures there only reflect fewer"
        " steps, not an effect of the remedy."
    )


def _evaluated_differently(compared: Sequence[ArmResult]) -> str | None:
    same = [
        arm
        for arm in compared
        if arm.num_seeds and arm.trains_alike and arm.loss_metric != "val/loss"
    ]
    if not same:
        return None
    names = listed(arm.label for arm in same)
    return f"Trained bitwise identically to the baseline, different only in evaluation: {names}."


def _losses(arms: Sequence[ArmResult], compared: Sequence[ArmResult]) -> str | None:
    """Losses of the arms that are significantly different in loss or have fewer failing seeds."""
    # An arm that only ends early is identical to its baseline up to its last step.
    full = [arm for arm in compared if arm.censored_at is None]
    known = [arm for arm in full if arm.comparisons["loss"].difference is not None]
    shown = [arm for arm in known if arm.comparisons["loss"].detected or reduces_failures(arm)]
    unpaired = [arm for arm in full if arm not in known and reduces_failures(arm) and arm.loss]
    clauses = []
    if shown:
        clauses.append(
            f"loss minus the baseline's, where both are clean: {listed(map(_cost, shown))}"
        )
    elif known:
        clauses.append(
            f"no arm's loss is significantly different from its baseline's{_p_range(known, 'loss')}"
        )
    if unpaired:
        own = listed(f"{arm.label} {arm.loss.mean:.3f}" for arm in unpaired if arm.loss)
        bases = {arm.baseline for arm in unpaired}
        clean = sum(arm.loss.num_seeds for arm in arms if arm.variant in bases and arm.loss)
        seeds = f"only {clean} seed{'' if clean == 1 else 's'}" if clean else "no seed"
        clauses.append(
            f"mean loss with {own}; not compared, because {seeds} of the baseline stayed finite"
        )
    sentence = "; ".join(clauses)
    return f"{sentence[0].upper()}{sentence[1:]}." if clauses else None


def _cost(arm: ArmResult) -> str:
    loss = arm.comparisons["loss"]
    assert loss.difference is not None
    ends = f"{signed(loss.difference.low)} to {signed(loss.difference.high)}"
    note = "" if loss.detected else "; not significant"
    return f"{arm.label} {signed(loss.difference.mean)} ({ends}{note})"


def _with_counts(arm: ArmResult) -> str:
    if arm.comparisons[PRIMARY].p_value is None or arm.untreated_nonfinite is None:
        return f"{arm.label} (nothing to compare)"
    counts, untreated = fraction(arm.nonfinite), fraction(arm.untreated_nonfinite)
    return f"{arm.label} ({counts}, against {untreated} untreated)"


def _against(arms: Sequence[ArmResult]) -> str:
    """Arms with their failing runs, strongest effect first, and the untreated runs beside them."""
    groups: dict[str, list[ArmResult]] = {}
    for arm in sorted(arms, key=lambda arm: _change(arm.comparisons[PRIMARY])):
        if arm.untreated_nonfinite is not None:
            groups.setdefault(fraction(arm.untreated_nonfinite), []).append(arm)
    return "; ".join(
        f"{listed(f'{arm.label} ({fraction(arm.nonfinite)} fail)' for arm in group)}, against"
        f" {untreated} untreated"
        for untreated, group in groups.items()
    )


def _p_range(arms: Sequence[ArmResult], endpoint: str = PRIMARY) -> str:
    found = [p for arm in arms if (p := arm.comparisons[endpoint].p_value) is not None]
    if not found:
        return ""
    low, high = min(found), max(found)
    if p_value(low) == p_value(high):
        return f", p {p_equals(low)}"
    return f", p from {p_value(low)} to {p_value(high)}"
