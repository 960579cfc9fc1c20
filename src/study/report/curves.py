"""Validation loss over the run: a panel an arm, every seed as a line, the baseline behind."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from src.study.analysis.results import Analysis, ArmResult
from src.study.read.collect import Run, Study
from src.study.report import svg
from src.study.report.elevenths import Validation, curve_metric, validations
from src.study.report.svg import BLUE, FAINT, GREY, MUTED, VERMILLION, Drawing, Scale

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 264.0, 190.0, 34.0, 8.0, 38.0, 22.0


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The validations of all runs of one arm."""

    arm: ArmResult
    runs: Sequence[Run]
    validations: Sequence[Sequence[Validation]]

    @property
    def clean(self) -> list[Sequence[Validation]]:
        """Those of clean runs, over which mean and band are taken."""
        pairs = zip(self.runs, self.validations, strict=True)
        return [found for run, found in pairs if run.outcome == "clean" and found]

    def steps(self) -> list[int]:
        """Where every clean run has a loss."""
        sets = [{v.step for v in found if v.loss is not None} for found in self.clean]
        return sorted(set.intersection(*sets)) if sets else []

    def at(self, step: int) -> list[float]:
        """The losses of the clean runs at a step."""
        return [
            v.loss for found in self.clean for v in found if v.step == step and v.loss is not None
        ]


def loss_curves(study: Study, analysis: Analysis) -> list[Drawing]:
    """A panel an arm, on shared axes; empty where nothing was validated."""
    curves = {}
    for arm in analysis.arms:
        runs = study.of(arm.variant)
        found = [validations(run, curve_metric(run, arm.loss_metric)) for run in runs]
        curves[arm.variant] = Curves(arm=arm, runs=runs, validations=found)
    losses = [
        v.loss
        for each in curves.values()
        for found in each.validations
        for v in found
        if v.loss is not None
    ]
    if not losses:
        return []
    x = Scale(low=0, high=max(run.max_steps for run in study.runs), start=LEFT, end=WIDTH - RIGHT)
    low, high = _range(losses)
    y = Scale(low=low, high=high, start=HEIGHT - BOTTOM, end=TOP)
    return [_panel(each, curves.get(each.arm.baseline or ""), x, y) for each in curves.values()]


def _range(losses: Sequence[float]) -> tuple[float, float]:
    """The losses with some room; what blew up is drawn on the upper edge."""
    low, high = min(losses), max(losses)
    usual = quantiles(losses, n=20)[-1] if len(losses) > 1 else high
    if high - low > 3 * (usual - low) > 0:
        high = low + 1.5 * (usual - low)
    pad = 0.05 * (high - low) or 0.05
    return low - pad, high + pad


def _panel(curves: Curves, baseline: Curves | None, x: Scale, y: Scale) -> Drawing:
    arm = curves.arm
    clean = len(curves.clean)
    parts = [
        svg.text(LEFT, 14, svg.fitted(arm.label, WIDTH - LEFT, size=13), size=13, bold=True),
        svg.text(LEFT, 29, f"{clean} of {len(curves.runs)} runs clean", size=11, fill=MUTED),
        _axes(x, y),
    ]
    if arm.acts_from:
        at = x(arm.acts_from)
        parts.append(svg.line(at, TOP, at, HEIGHT - BOTTOM, stroke=MUTED, dash="2 3"))
    if baseline is not None:
        parts.append(_lines(baseline, x, y, colour=GREY, with_marks=False))
    parts.append(_lines(curves, x, y, colour=BLUE, with_marks=True))
    return Drawing(
        width=WIDTH,
        height=HEIGHT,
        body="".join(parts),
        label=f"Validation loss over steps, {arm.label}, {clean} of {len(curves.runs)} runs clean",
    )


def _axes(x: Scale, y: Scale) -> str:
    parts = [svg.levels(y, LEFT, WIDTH - RIGHT, most=7, size=10.5)]
    for tick in x.ticks(4):
        parts.append(
            svg.text(x(tick), HEIGHT - 6, f"{tick:,.0f}", size=10.5, anchor="middle", fill=MUTED)
        )
    parts.append(svg.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, stroke=FAINT))
    return "".join(parts)


def _lines(curves: Curves, x: Scale, y: Scale, *, colour: str, with_marks: bool) -> str:
    parts = []
    for found in curves.validations:
        pieces = _pieces(found, x, y)
        parts.append(svg.polyline(pieces, stroke=colour, width=0.9, opacity=0.65))
        damaged = [v for v in found if v.nonfinite_frac > 0 and v.loss is not None]
        for v in damaged if with_marks else ():
            hint = f"step {v.step}: {v.nonfinite_frac:.0%} of windows non-finite"
            parts.append(
                svg.marker(
                    "cross", x(v.step), y(v.loss or 0.0), 2.4, fill="none", stroke=VERMILLION,
                    hint=hint,
                )
            )  # fmt: skip
    steps = curves.steps()
    if steps:
        values = {step: curves.at(step) for step in steps}
        upper = [(x(step), y(max(values[step]))) for step in steps]
        lower = [(x(step), y(min(values[step]))) for step in steps]
        mean = [(x(step), y(fmean(values[step]))) for step in steps]
        if len(curves.clean) > 1:
            parts.append(svg.area(upper, lower, fill=colour, opacity=0.18))
        parts.append(svg.polyline([mean], stroke=colour, width=2))
    return "".join(parts)


def _pieces(found: Sequence[Validation], x: Scale, y: Scale) -> list[list[tuple[float, float]]]:
    """The line of one run, broken where no window was finite."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for v in found:
        if v.loss is None:
            pieces.append([])
        else:
            pieces[-1].append((x(v.step), y(v.loss)))
    return pieces
