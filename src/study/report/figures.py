"""The key figures of a report: every arm a row, every seed a point at its own height in the row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from src.study.analysis.results import Analysis, ArmResult, Estimate
from src.study.analysis.rows import frac_metric, role
from src.study.read.collect import Run, Study
from src.study.report import svg
from src.study.report.svg import (
    BLUE,
    GREY,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    SHADE,
    VERMILLION,
    Drawing,
    Scale,
)

MARKERS = {
    "clean": ("circle", "#ffffff", BLUE, "clean"),
    "intermittent": ("triangle", ORANGE, "#7a5200", "intermittent: batches skipped, recovered"),
    "collapsed": ("square", VERMILLION, "#8a3c00", "collapsed"),
    "stopped": ("diamond", PURPLE, "#7d4565", "stopped by the guard"),
}
"""Outcome: shape, fill, outline, words."""

OTHER = ("cross", "none", MUTED, "failed, killed or not finished")

WIDTH, TOP, BOTTOM, RIGHT = 540.0, 40.0, 24.0, 62.0
RADIUS = 4.2


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run in its row."""

    run: Run
    value: float
    hint: str
    reference: float | None = None
    """The baseline's value with the same seed."""
    is_pale: bool = False
    """Whether it failed before its arm could act."""


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One arm."""

    arm: ArmResult
    points: Sequence[Point]
    estimate: Estimate | None
    end: str
    """Said at the right of the row."""


def failures(study: Study, analysis: Analysis) -> Drawing:
    """Non-finite batches of every run, after the step from which its arm acts."""
    strips = []
    for arm in analysis.arms:
        points = []
        for run in study.of(arm.variant):
            count = _failures_after(run, run.acts_from)
            baseline = baseline_of(run, study)
            points.append(
                Point(
                    run=run,
                    value=count,
                    hint=f"{count:.0f} non-finite batches",
                    is_pale=any(step <= run.acts_from for step in run.nonfinite_steps),
                    reference=None
                    if baseline is None
                    else _failures_after(baseline, run.acts_from),
                )
            )
        end = f"{arm.nonfinite.events} of {arm.nonfinite.total}"
        strips.append(Strip(arm=arm, points=points, estimate=arm.nonfinite_batches, end=end))
    most = max([10.0, *(point.value for strip in strips for point in strip.points)])
    return draw_strips(
        strips,
        Scale(low=0.0, high=most * 1.1, start=0, end=0, log=True),
        title="Non-finite batches of each seed",
        end_title="seeds",
    )


def final_losses(study: Study, analysis: Analysis) -> Drawing | None:
    """Final validation loss of every run that has one; None where none has."""
    strips = []
    for arm in analysis.arms:
        points = []
        for run in study.of(arm.variant):
            value = run.final(arm.loss_metric)
            if value is not None:
                frac = run.final(frac_metric(arm.loss_metric)) or 0.0
                damage = f", {frac:.0%} of windows non-finite" if frac else ""
                hint = f"{arm.loss_metric} {value:.3f}{damage}"
                points.append(Point(run=run, value=value, hint=hint))
        end = "none clean" if arm.loss is None else f"{arm.loss.mean:.3f}"
        strips.append(Strip(arm=arm, points=points, estimate=arm.loss, end=end))
    values = [point.value for strip in strips for point in strip.points]
    if not values:
        return None
    pad = 0.08 * (max(values) - min(values)) or 0.05
    return draw_strips(
        strips,
        Scale(low=min(values) - pad, high=max(values) + pad, start=0, end=0),
        title="Final validation loss of each seed, nats a token",
        end_title="clean mean",
    )


def _failures_after(run: Run, step: int) -> float:
    return float(sum(number > step for number in run.nonfinite_steps))


def baseline_of(run: Run, study: Study) -> Run | None:
    """The run that it is paired with."""
    if run.baseline is None:
        return None
    pairs = [other for other in study.of(run.baseline) if other.seed == run.seed]
    same = [other for other in pairs if other.repeat == run.repeat]
    return next(iter(same or pairs), None)


def draw_strips(strips: Sequence[Strip], domain: Scale, *, title: str, end_title: str) -> Drawing:
    """One row an arm; seeds keep their height within a row, so that eyes can pair them."""
    longest = max(len(strip.arm.label) for strip in strips)
    left = min(220.0, max(80.0, 8.8 * longest + 16))
    x = Scale(low=domain.low, high=domain.high, start=left, end=WIDTH - RIGHT, log=domain.log)
    ranks = _ranks(strips)
    spacing = min(7.0, 60.0 / max(1, len(ranks)))
    row_height = max(34.0, spacing * len(ranks) + 16)
    height = TOP + row_height * len(strips) + BOTTOM
    parts = [svg.text(0, 15, title, size=13, bold=True)]
    parts.append(svg.text(WIDTH, TOP - 7, end_title, size=11, anchor="end", fill=MUTED))
    rows = []
    for index, strip in enumerate(strips):
        top = TOP + row_height * index
        if index % 2 == 0:
            parts.append(svg.rect(0, top, WIDTH, row_height, fill=SHADE))
        rows.append(_row(strip, x, top=top, height=row_height, ranks=ranks, spacing=spacing))
    base = TOP + row_height * len(strips)
    for tick in x.ticks(7):
        parts.append(svg.line(x(tick), TOP, x(tick), base))
        parts.append(
            svg.text(x(tick), base + 16, f"{tick:g}", size=11, anchor="middle", fill=MUTED)
        )
    return Drawing(width=WIDTH, height=height, body="".join(parts + rows), label=f"{title}, by arm")


def _ranks(strips: Sequence[Strip]) -> Mapping[tuple[int, int], int]:
    """The place of each (seed, repeat) in a row."""
    known = {(p.run.seed, p.run.repeat) for strip in strips for p in strip.points}
    return {key: index for index, key in enumerate(sorted(known))}


def _row(
    strip: Strip,
    x: Scale,
    *,
    top: float,
    height: float,
    ranks: Mapping[tuple[int, int], int],
    spacing: float,
) -> str:
    middle = top + height / 2
    about = role(strip.arm)
    label = svg.fitted(strip.arm.label, x.start - 8, size=13)
    parts = [svg.text(4, middle + (-1 if about else 4.5), label, size=13, bold=True)]
    if about:
        parts.append(svg.text(4, middle + 12, about, size=11, fill=MUTED))
    parts.append(svg.text(WIDTH - 4, middle + 4.5, strip.end, size=13, anchor="end"))
    if strip.estimate is not None:
        parts.append(_interval(strip.estimate, x, top=top, height=height))
    for point in strip.points:
        rank = ranks[point.run.seed, point.run.repeat]
        y = round(middle - 3 + spacing * (rank - (len(ranks) - 1) / 2), 1)
        if point.reference is not None:
            at = x(point.reference)
            parts.append(svg.line(at, y - 4, at, y + 4, stroke=GREY, width=1.6))
        parts.append(_mark(point, x(point.value), y))
    return "".join(parts)


def _interval(estimate: Estimate, x: Scale, *, top: float, height: float) -> str:
    """The mean as a stroke, the interval as a bar beneath the points."""
    y, mean = top + height - 4, x(estimate.mean)
    bar = svg.line(x(estimate.low), y, x(estimate.high), y, stroke=GREY, width=2)
    return bar + svg.line(mean, y - 4, mean, y + 3, stroke=INK, width=2)


def _mark(point: Point, x: float, y: float) -> str:
    shape, fill, stroke, _ = MARKERS.get(point.run.outcome, OTHER)
    hint = f"{point.run.name}: {point.hint}"
    drawn = svg.marker(shape, x, y, RADIUS, fill=fill, stroke=stroke, hint=hint)
    return f'<g opacity="0.35">{drawn}</g>' if point.is_pale else drawn


def legend(study: Study) -> list[tuple[str, str]]:
    """The points that occur, each as a small drawing and its words."""
    outcomes = {run.outcome for run in study.runs}
    kinds = [MARKERS[name] for name in MARKERS if name in outcomes]
    kinds += [OTHER] if outcomes - set(MARKERS) else []
    entries = []
    for shape, fill, stroke, words in kinds:
        body = svg.marker(shape, 7, 7, RADIUS, fill=fill, stroke=stroke, hint="")
        entries.append((Drawing(width=14, height=14, body=body, label=words).svg(), words))
    return entries


def save(drawings: Mapping[str, Drawing], folder: Path) -> None:
    """Writes each as a file of its own; others that lie there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings.items():
        (folder / f"{name}.svg").write_text(drawing.svg(standalone=True), encoding="utf-8")
