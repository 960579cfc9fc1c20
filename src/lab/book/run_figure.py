"""The curve of one run: its loss, and how many batches were lost up to each step."""

from src.lab.book.single import SingleRun
from src.study.report import svg
from src.study.report.svg import BLUE, FAINT, MUTED, VERMILLION, Drawing, Scale

WIDTH, HEIGHT, LEFT, RIGHT, GAP = 720.0, 330.0, 44.0, 22.0, 34.0
TOP, MIDDLE, BOTTOM = 30.0, 200.0, 24.0


def run_figure(run: SingleRun) -> Drawing:
    """Two panels over the same steps; the line down is the first batch that was not finite."""
    steps = run.recipe.max_steps
    x = Scale(low=0, high=steps, start=LEFT, end=WIDTH - RIGHT)
    losses = [(row["step"], row["loss"]) for row in run.curve if "loss" in row]
    # What comes in the first fiftieth of a run would take the room of all the rest.
    usual = [loss for step, loss in losses if step >= steps / 50] or [loss for _, loss in losses]
    lost = [
        (row["step"], row["nonfinite_batches"]) for row in run.curve if "nonfinite_batches" in row
    ]
    upper = Scale(low=0, high=max(usual), start=MIDDLE, end=TOP)
    most = max([1.0, *(count for _, count in lost)])
    lower = Scale(low=0, high=most, start=HEIGHT - BOTTOM, end=MIDDLE + GAP)
    parts = [
        svg.text(LEFT, TOP - 12, "training loss, nats a token", size=12.5, bold=True),
        svg.levels(upper, LEFT, WIDTH - RIGHT, most=6, size=10.5),
        svg.text(LEFT, MIDDLE + GAP - 10, "batches not finite so far", size=12.5, bold=True),
        svg.levels(lower, LEFT, WIDTH - RIGHT, most=4, size=10.5),
    ]
    parts += [
        svg.text(x(tick), HEIGHT - 6, f"{tick:,.0f}", size=10.5, anchor="middle", fill=MUTED)
        for tick in x.ticks(12)
    ]
    parts.append(svg.line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, stroke=FAINT))
    for scale, points, colour in ((upper, losses, BLUE), (lower, lost, VERMILLION)):
        parts.append(
            svg.polyline([[(x(step), scale(y)) for step, y in points]], stroke=colour, width=1.8)
        )
    if run.first_nonfinite is not None:
        at = x(run.first_nonfinite)
        parts.append(svg.line(at, TOP, at, HEIGHT - BOTTOM, stroke=MUTED, dash="3 3"))
        said = f"first at step {run.first_nonfinite:,}"
        parts.append(svg.text(at + 6, TOP + 12, said, size=11.5, fill=MUTED))
    return Drawing(
        width=WIDTH,
        height=HEIGHT,
        body="".join(parts),
        label="Training loss and batches that were not finite, over the steps of one run",
    )
