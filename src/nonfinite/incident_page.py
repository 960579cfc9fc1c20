"""A page on one incident: what happened and the steps before it, in one file."""

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { background: #f4f4f4; padding: .1rem .3rem; overflow-x: auto; }
pre { padding: 1rem; } svg { max-width: 100%; height: auto; }
"""


def write_page(
    path: Path, incident: dict[str, Any], ring: Sequence[dict[str, float]], *, repeat: str | None
) -> None:
    """Writes the page.

    Args:
        path: of the HTML file.
        incident: what the recorder has found.
        ring: figures of the last steps, each with its `step`.
        repeat: the command that runs the step again; None: the state cannot be read again.
    """
    shown = {key: incident[key] for key in ("finding", "figures", "largest_gradients")}
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Incident in step {incident["step"]}</title>
<style>{STYLE}</style>
<h1>Step {incident["step"]}: {html.escape(incident["cause"])}</h1>
<p>{html.escape(incident["line"])}</p>
{_curves(ring)}
<h2>Figures</h2>
<pre>{html.escape(json.dumps(shown, indent=2))}</pre>
<p>{_advice(repeat)}</p>
</html>
"""
    path.write_text(page, encoding="utf-8")


def _advice(repeat: str | None) -> str:
    if repeat is None:
        return "Its state holds more than tensors and plain values, and cannot be run again."
    return f"Repeat it with <code>{html.escape(repeat)}</code>."


def _curves(ring: Sequence[dict[str, float]]) -> str:
    """Loss, gradient norm and router biases over the last steps, as inline SVG.

    Drawn where matplotlib is installed, which training does not require.
    """
    if not ring:
        return "<p>No step came before it.</p>"
    # Late, because drawing takes half a second to import and most runs have no incident.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Curves of the steps before it are drawn where matplotlib is installed.</p>"

    steps = [entry["step"] for entry in ring]
    biases = [key for key in ring[-1] if key.startswith("bias_mean/")]
    panels = 3 if biases else 2
    figure = Figure(figsize=(9, 2.2 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    axes[0].plot(steps, [e["loss"] for e in ring], color="#0072b2")
    axes[0].set_ylabel("loss")
    axes[1].semilogy(steps, [e["grad_norm"] for e in ring], color="#d55e00")
    axes[1].set_ylabel("gradient norm")
    for key in biases:
        axes[2].plot(steps, [e.get(key, float("nan")) for e in ring], label=key.partition("/")[2])
    if biases:
        axes[2].set_ylabel("mean router bias")
        if len(biases) <= 8:
            axes[2].legend(fontsize="x-small")
    axes[-1].set_xlabel("step")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
