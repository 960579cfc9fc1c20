"""When each run spiked and when it was not finite: a line a run."""

from collections.abc import Iterable, Sequence

from src.common.number_format import NONE
from src.study.analysis.results import Analysis
from src.study.read.collect import Run, Study
from src.study.report import svg
from src.study.report.svg import BLUE, INK, MUTED, VERMILLION, Drawing, Scale

WIDTH, LEFT, RIGHT, LINE, HEAD = 960.0, 78.0, 150.0, 13.0, 24.0


def timeline(study: Study, analysis: Analysis) -> Drawing:
    """Runs below each other, grouped by arm, over their steps."""
    longest = max(max(run.max_steps, _steps_made(run)) for run in study.runs)
    x = Scale(low=0, high=longest, start=LEFT, end=WIDTH - RIGHT)
    y, parts = 6.0, [""]
    for arm in analysis.arms:
        runs = study.of(arm.variant)
        parts.append(svg.text(0, y + 15, svg.fitted(arm.label, WIDTH), size=13, bold=True))
        top = y + HEAD
        if arm.acts_from:
            at, base = x(arm.acts_from), top + LINE * len(runs)
            parts.append(svg.line(at, top - 4, at, base, stroke=MUTED, dash="2 3"))
            words = f"acts after step {arm.acts_from:,}"
            parts.append(svg.text(at + 4, y + 15, words, size=11, fill=MUTED))
        for index, run in enumerate(runs):
            parts.append(_line(run, x, top + LINE * (index + 0.5)))
        y = top + LINE * len(runs) + 6
    # Behind all else.
    parts[0] = "".join(svg.line(x(tick), HEAD, x(tick), y) for tick in x.ticks(8))
    for tick in x.ticks(8):
        parts.append(
            svg.text(x(tick), y + 14, f"{tick:,.0f}", size=11, anchor="middle", fill=MUTED)
        )
    parts.append(svg.text(WIDTH - RIGHT + 12, y + 14, "step", size=11, fill=MUTED))
    return Drawing(
        width=WIDTH,
        height=y + 22,
        body="".join(parts),
        label="Spikes and non-finite steps of every run, by step",
    )


def _steps_made(run: Run) -> int:
    """Steps of a run, whether it has ended or not."""
    return run.steps or int(max((line["step"] for line in run.lines), default=0))


def _line(run: Run, x: Scale, y: float) -> str:
    made = _steps_made(run)
    nonfinite = set(run.nonfinite_steps)
    spikes = [step for step in run.spike_steps if step not in nonfinite]
    name = f"seed {run.seed}" + (f" · {run.repeat}" if run.repeat else "")
    parts = [
        svg.text(LEFT - 8, y + 4, name, size=11, anchor="end", fill=MUTED),
        svg.line(x(0), y, x(made), y, stroke="#b9bdc2", width=1.5),
        svg.line(x(made), y - 3, x(made), y + 3, stroke=INK, width=1.2),
        _bars(sorted(nonfinite), x, y),
        _flags(spikes, x, y),
    ]
    said = [f"{len(nonfinite):,} non-finite"] if nonfinite else []
    said += [f"{len(spikes):,} spike{'s' if len(spikes) > 1 else ''}"] if spikes else []
    if run.status != "finished" or made < run.max_steps:
        how = "ends" if run.status == "finished" else run.status
        ended = f"{how} at step {made:,}"
        # Beside the end, where nothing else is drawn; with the counts where the end is late.
        if x(made) + 6.5 * len(ended) < WIDTH - RIGHT:
            parts.append(svg.text(x(made) + 6, y + 4, ended, size=11, fill=MUTED))
        else:
            said.append(how)
    parts.append(svg.text(WIDTH - RIGHT + 12, y + 4, ", ".join(said) or NONE, size=11, fill=MUTED))
    return "".join(parts)


def _bars(steps: Sequence[int], x: Scale, y: float) -> str:
    """Full-height bars; steps that stand side by side are one bar."""
    half = (LINE - 3) / 2
    pieces = [
        f"M{start:g} {y - half:g}h{end - start + 1.6:g}v{2 * half:g}H{start:g}z"
        for start, end in _merged((x(step) for step in steps), reach=max(1.6, 1.01 * (x(1) - x(0))))
    ]
    return f'<path d="{"".join(pieces)}" fill="{VERMILLION}"/>' if pieces else ""


def _flags(steps: Sequence[int], x: Scale, y: float) -> str:
    """Small triangles above the line, one a place."""
    pieces = [
        f"M{start:g} {y - 0.5:g}l-2.6 -5h5.2z"
        for start, _ in _merged((x(step) for step in steps), reach=0.9)
    ]
    return f'<path d="{"".join(pieces)}" fill="{BLUE}"/>' if pieces else ""


def _merged(places: Iterable[float], *, reach: float) -> list[tuple[float, float]]:
    """Ranges of places that are no further apart than that."""
    ranges: list[tuple[float, float]] = []
    for place in places:
        if ranges and place - ranges[-1][1] <= reach:
            ranges[-1] = (ranges[-1][0], place)
        else:
            ranges.append((place, place))
    return ranges
