"""Warnings about a study: runs that are missing, and runs that should not be mixed."""

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from src.common.number_format import p_equals
from src.config.field_roles import role_of, set_by
from src.stability import REMEDIES
from src.study.analysis.answer_without_failures import nothing_fails
from src.study.analysis.endpoints import has_ended
from src.study.analysis.results import ArmResult
from src.study.analysis.stats import ALPHA
from src.study.read.collect import Run, Study, flat


def warnings(study: Study, arms: Sequence[ArmResult]) -> list[str]:
    """The warnings as sentences, the more serious ones first."""
    by_name, looks = {arm.variant: arm for arm in arms}, study.looks
    runs = {arm.variant: study.of(arm.variant) for arm in arms}
    treated = [a for a in arms if a.baseline and runs[a.variant][0].axes["stability"] != "none"]
    found = [*study.damages, *_controls(treated, arms)]
    for arm in arms:
        found += _missing(arm, runs, looks.get(arm.variant, ())[: arm.num_looks])
        found += _not_ended(arm, runs[arm.variant])
        found += _truncated(arm, runs[arm.variant])
        found += _starts(arm, runs[arm.variant])
    # A remedy that acts only on evaluation would count every failure as an earlier one.
    found += _failed_before([arm for arm in arms if arm.acts_from < runs[arm.variant][0].max_steps])
    found += _ended_by_the_guard(study.runs)
    found += _mixed(study.runs)
    for arm in arms:
        if arm.baseline in by_name:
            found += _differing(arm, runs[arm.variant], runs[str(arm.baseline)])
    for arm in arms:
        notes = dict.fromkeys(n for run in runs[arm.variant] for n in run.record.get("notes", []))
        found += [f"{arm.label}: {note}" for note in notes]
    return found


def _controls(remedies: Sequence[ArmResult], arms: Sequence[ArmResult]) -> Iterator[str]:
    if not remedies:
        return
    if not any(arm.is_positive_control for arm in remedies) and not nothing_fails(arms):
        yield (
            "no positive control (a remedy known to work, such as router_eps): if no remedy is"
            " significantly different, the study may be too small to see it"
        )
    if not any(arm.is_aa_control for arm in remedies):
        yield "no A/A control: add stability=shaken_full, to see how much runs differ by chance"
    for arm in remedies:
        for comparison in arm.comparisons.values() if arm.is_aa_control else ():
            if comparison.p_value is not None and comparison.p_value <= ALPHA:
                yield (
                    f"{arm.label} is an A/A control and is significantly different in"
                    f" {comparison.endpoint} (p {p_equals(comparison.p_value)}): this happens by"
                    f" chance in one of {1 / ALPHA:.0f} studies, or something else makes it differ"
                )


def _missing(
    arm: ArmResult, runs: Mapping[str, Sequence[Run]], looks: Sequence[Sequence[int]]
) -> Iterator[str]:
    if arm.baseline is None:
        return
    if arm.baseline not in runs:
        yield f"{arm.label}: its baseline {arm.baseline} has no runs in this study"
        return
    own, others = ({run.seed for run in runs[name]} for name in (arm.variant, arm.baseline))
    # In a sequential study, an arm that is decided gets no further seeds.
    expected = others & set(looks[-1]) if looks else others
    if lacking := sorted(expected - own):
        yield f"{arm.label}: {_seeds(lacking)} missing, but run in its baseline"
    if alone := sorted(own - others):
        yield f"{arm.label}: {_seeds(alone)} not compared, because not run in its baseline"


def _seeds(numbers: Sequence[int]) -> str:
    listed = ", ".join(str(number) for number in numbers)
    return f"seed{'s' if len(numbers) > 1 else ''} {listed}"


def _not_ended(arm: ArmResult, runs: Sequence[Run]) -> Iterator[str]:
    for status in ("failed", "killed", "unfinished"):
        names = [run.folder.name for run in runs if run.status == status and not has_ended(run)]
        if names:
            yield f"{arm.label}: not compared, because {status}: {', '.join(names)}"
    stopped = [r.folder.name for r in runs if r.outcome == "stopped" and not _is_to_stop(r)]
    if stopped:
        yield (
            f"{arm.label}: stopped by the guard, so counts of batches are lower bounds:"
            f" {', '.join(stopped)}"
        )


def _is_to_stop(run: Run) -> bool:
    """Whether a run is meant to end at its first failure."""
    return bool(run.config.get("guard", {}).get("on_nonfinite") == "stop")


def _ended_by_the_guard(runs: Sequence[Run]) -> Iterator[str]:
    if any(run.outcome == "stopped" and _is_to_stop(run) for run in runs):
        yield (
            "runs end at their first non-finite step (guard.on_nonfinite=stop): only whether and"
            " when they fail can be compared, not how many batches do"
        )


def _truncated(arm: ArmResult, runs: Sequence[Run]) -> Iterator[str]:
    ends = [run.lines[-1]["step"] if run.lines else 0 for run in runs]
    short = [
        f"{run.folder.name} (to step {end:.0f} of {run.steps})"
        for run, end in zip(runs, ends, strict=True)
        if run.status == "finished" and end < run.steps
    ]
    if short:
        yield (
            f"{arm.label}: metrics.jsonl is truncated, so curves and losses at equal cost are"
            f" incomplete: {', '.join(short)}"
        )


def _failed_before(arms: Sequence[ArmResult]) -> Iterator[str]:
    """Seeds that failed before an arm could act; arms with the same start share a warning."""
    groups: dict[tuple[str | None, int, int, int], list[str]] = {}
    for arm in arms:
        if arm.num_failed_before:
            seeds = arm.num_failed_before + arm.num_at_risk
            key = arm.baseline, arm.num_failed_before, seeds, arm.acts_from
            groups.setdefault(key, []).append(arm.label)
    for (_, failed, seeds, step), labels in groups.items():
        yield (
            f"{', '.join(labels)}: {failed} of {seeds} seeds failed by step {step}, before the arm"
            " could act, and are left out of the comparison of failures"
        )


def _starts(arm: ArmResult, runs: Sequence[Run]) -> Iterator[str]:
    starts = {run.acts_from for run in runs if has_ended(run)}
    if len(starts) > 1:
        listed = ", ".join(str(start) for start in sorted(starts))
        yield (
            f"{arm.label}: its runs begin to act at different steps ({listed}); the last one is"
            " used for all"
        )


def _mixed(runs: Sequence[Run]) -> Iterator[str]:
    records = [run.record for run in runs if run.record]

    def kinds(*path: str) -> list[str]:
        found: dict[str, None] = {}
        for record in records:
            value: Any = record
            for name in path:
                value = value.get(name) if isinstance(value, Mapping) else None
            found[str(value)] = None
        return sorted(found)

    commits, code = kinds("git_sha"), kinds("code")
    if len(commits) == 1 and len(code) > 1:
        yield f"runs of {len(code)} versions of the code: it was changed between runs"
    if len(commits) > 1:
        same = ", all with the same code" if len(code) == 1 and code != ["None"] else ""
        listed = ", ".join(commit[:10] for commit in commits)
        yield f"runs of {len(commits)} commits ({listed}){same}"
    dirty = sum(bool(record.get("git_dirty")) for record in records)
    if dirty:
        yield f"{dirty} of {len(records)} runs come from a checkout with uncommitted changes"
    libraries = {name for record in records for name in record.get("versions", {})}
    for name in sorted(libraries):
        if len(versions := kinds("versions", name)) > 1:
            yield f"runs of several versions of {name}: {', '.join(versions)}"
    if len(devices := kinds("device", "name")) > 1:
        yield f"runs on several devices: {', '.join(devices)}"


def _differing(arm: ArmResult, runs: Sequence[Run], baseline: Sequence[Run]) -> Iterator[str]:
    reference = {run.seed: run for run in baseline}
    found: dict[str, None] = {}
    for run in runs:
        if run.seed in reference:
            found |= dict.fromkeys(_unexpected(run, reference[run.seed]))
    if found:
        yield f"{arm.label}: also differs from its baseline in {', '.join(found)}"


def _unexpected(run: Run, baseline: Run) -> list[str]:
    """Fields in which two runs differ, although no variant name or remedy accounts for it."""
    sections = [
        name
        for name, value in run.config.items()
        if isinstance(value, dict)
        and role_of(name).is_param
        and name not in ("stability", "trainer", "init")  # in the name, or compared by _mixed
        and value != baseline.config.get(name)
    ]
    if not sections:
        return []
    one, two = flat(run.config, sections), flat(baseline.config, sections)
    differing = [field for field in {**one, **two} if one.get(field) != two.get(field)]
    allowed = [*_set_by_remedies(run), *_set_by_remedies(baseline)]
    for group in ("attention", "ffn", "tokenizer", "data", "model", "preset"):
        if run.config["choices"].get(group) != baseline.config["choices"].get(group):
            allowed += [group, *set_by(group)]
    if run.config.get("init") != baseline.config.get("init"):
        allowed += set_by("init")
    for variant in (run.variant, baseline.variant):
        allowed += [field.partition("-")[0] for field in variant.split("@")[1:]]
    return [
        f"{field} ({one.get(field)}, baseline {two.get(field)})"
        for field in differing
        if not any(_names(text, field) for text in allowed)
    ]


def _names(text: str, field: str) -> bool:
    """Whether the text, a section or part of a dotted name, refers to the field or a parent."""
    return field == text or field.startswith(f"{text}.") or f".{text}." in f"{field}."


def _set_by_remedies(run: Run) -> list[str]:
    """Fields outside the stability section that the run's remedies set."""
    parts = {name: _attributes(value) for name, value in run.config.items()}
    overridden: list[str] = []
    for option, fields in run.config["stability"].items():
        if option not in REMEDIES:
            continue
        try:
            remedy = REMEDIES[option](**fields)
        except TypeError:
            # Other code wrote this, in which the remedy had other fields. What it set is unknown
            # and stays among the differences.
            continue
        overridden += remedy.config_overrides(parts)
    return overridden


def _attributes(value: Any) -> Any:
    if isinstance(value, Mapping):
        return SimpleNamespace(**{str(key): _attributes(inner) for key, inner in value.items()})
    return value
