"""The files of an incident: values that can be saved safely, and its HTML page."""

import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { background: #f4f4f4; padding: .1rem .3rem; overflow-x: auto; }
pre { padding: 1rem; } svg { max-width: 100%; height: auto; }
"""


def write_page(
    path: Path, incident: dict[str, Any], ring: Sequence[dict[str, float]], *, repeat: str | None
) -> None:
    """Writes the page on an incident: what happened, and curves of the steps before it.

    Args:
        path: path of the HTML file.
        incident: what the recorder found.
        ring: metrics of the last steps, each with its `step`.
        repeat: the command that reruns the step; None if the saved state cannot be read back.
    """
    shown = {key: incident[key] for key in ("finding", "figures", "largest_gradients")}
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Incident in step {incident["step"]}</title>
<style>{STYLE}</style>
<h1>Step {incident["step"]}: {html.escape(incident["cause"])}</h1>
<p>{html.escape(incident["line"])}</p>
{_curves(ring)}
<h2>Values</h2>
<pre>{html.escape(json.dumps(shown, indent=2))}</pre>
<p>{_advice(repeat)}</p>
</html>
"""
    path.write_text(page, encoding="utf-8")


def _advice(repeat: str | None) -> str:
    if repeat is None:
        return "The step cannot be rerun: its state holds more than tensors and plain values."
    return f"Rerun the step with <code>{html.escape(repeat)}</code>."


def _curves(ring: Sequence[dict[str, float]]) -> str:
    """Loss, gradient norm and router biases over the last steps, as inline SVG.

    Needs matplotlib, which training does not require.
    """
    if not ring:
        return "<p>It is the first step.</p>"
    # Imported here, because matplotlib takes half a second to import and incidents are rare.
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Install matplotlib to see curves of the steps before the incident.</p>"

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


def with_plain_values(batch: Any) -> Any:
    """A batch with dicts for mappings of any class, and tensors for arrays."""
    if isinstance(batch, Mapping):
        return {name: with_plain_values(value) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(with_plain_values(value) for value in batch)
    if isinstance(batch, np.generic):
        return batch.item()
    if isinstance(batch, np.ndarray):
        try:
            return torch.from_numpy(np.array(batch))
        # An array of text, of objects, or of a dtype that tensors do not have.
        except (TypeError, ValueError):
            return batch
    return batch


def unreadable_type(file: Path) -> str | None:
    """The type in a file saved by torch that cannot be read back safely; None if all can."""
    try:
        torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    # A user's batch may hold objects that fail in any way.
    except Exception as error:
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        return type(error).__name__ if unsafe is None else unsafe[1]
    return None


def json_safe(value: Any) -> Any:
    """The value with null in place of NaN and infinities, which JSON cannot express."""
    if isinstance(value, dict):
        return {key: json_safe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
