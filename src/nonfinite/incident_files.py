"""The files of an incident: values that can be saved safely, and its HTML page."""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

STYLE = """
:root { color-scheme: light dark; --shade: color-mix(in srgb, currentColor 8%, transparent); }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 1.5rem auto;
       padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, pre { background: var(--shade); padding: .1rem .3rem; border-radius: .2rem; }
pre { padding: .8rem; overflow-x: auto; overflow-wrap: normal; }
pre.code { white-space: pre-wrap; }
svg { max-width: 100%; height: auto; display: block; }
.cause { font-size: 1.1rem; }
"""

GREY = "#808080"
"""Readable on white and on black."""


def write_page(
    path: Path, incident: Mapping[str, Any], ring: Sequence[Mapping[str, float]], *, advice: str
) -> None:
    """Writes the page on an incident: what happened, the line, the curves, what to do, details.

    Args:
        path: path of the HTML file.
        incident: what the recorder found.
        ring: metrics of the last steps, each with its `step`.
        advice: how to run the step again, or why that is not possible, as HTML.
    """
    shown = {key: incident[key] for key in ("finding", "figures", "largest_gradients")}
    source = incident["source"]
    code = ""
    if source is not None:
        place = html.escape(f"{source['file']}, line {source['line']}")
        code = f"<p>The line: {place}</p>\n<pre class='code'>{html.escape(source['code'])}</pre>"
    helps = incident["advice"]
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Incident in step {incident["step"]}</title><style>{STYLE}</style></head><body>
<h1>Step {incident["step"]}: {html.escape(incident["cause"])}</h1>
<p class="cause">{html.escape(incident["explanation"])}</p>
{"" if helps is None else f"<p>What usually helps: {html.escape(helps)}.</p>"}
{code}
<p>{html.escape(_rerun_words(incident))}</p>
<h2>Before this step</h2>
{_curves(ring)}
<h2>Run it again</h2>
<p>{advice}</p>
<h2>Details</h2>
<p>{html.escape(incident["line"])}</p>
<pre>{html.escape(json.dumps(json_safe(shown), indent=2))}</pre>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _rerun_words(incident: Mapping[str, Any]) -> str:
    """What the reruns say about software and hardware."""
    if incident["reproduced"] is None:
        return "The step was not run again."
    words = {
        "bitwise": "Two reruns gave the same numbers, bitwise: it is software.",
        "in kind": "Two reruns failed at the same operation with other numbers: some operation is"
        " not deterministic.",
        "differs": "Of two reruns, one differed: an operation that is not deterministic, or the"
        " hardware.",
    }
    return words.get(str(incident.get("reruns")), "A rerun with the same inputs was finite.")


def _curves(ring: Sequence[Mapping[str, float]]) -> str:
    """Loss, gradient norm and router biases over the last steps, as inline SVG.

    Needs altair, which training does not require.
    """
    if not ring:
        return "<p>It is the first step.</p>"
    # Imported here, because it takes a second to import and incidents are rare.
    try:
        import altair
    except ImportError:
        return "<p>Install altair and vl-convert-python to see curves.</p>"

    panels = [_panel(altair, ring, ["grad_norm"], "gradient norm", log=True)]
    if "loss" in ring[-1]:
        panels.insert(0, _panel(altair, ring, ["loss"], "loss", log=False))
    biases = [key for key in ring[-1] if key.startswith("bias_mean/")]
    if biases:
        panels.append(_panel(altair, ring, biases, "mean router bias", log=False))
    try:
        import vl_convert
    except ImportError:
        return "<p>Install vl-convert-python to see curves.</p>"
    chart = altair.vconcat(*panels).configure(background="transparent")
    chart = chart.configure_view(stroke=GREY).configure_axis(
        labelColor=GREY, titleColor=GREY, gridOpacity=0.2, domainColor=GREY, tickColor=GREY
    )
    return str(vl_convert.vegalite_to_svg(chart.to_dict()))


def _panel(
    altair: Any, ring: Sequence[Mapping[str, float]], keys: list[str], title: str, *, log: bool
) -> Any:
    """One curve for each key; a logarithmic axis leaves out what is not positive."""
    rows = [
        {"step": entry["step"], "value": entry[key], "of": key.partition("/")[2] or key}
        for key in keys
        for entry in ring
        if key in entry and math.isfinite(entry[key]) and (entry[key] > 0 or not log)
    ]
    scale = altair.Scale(type="log" if log else "linear", zero=False)
    colour = altair.value("#0072b2") if len(keys) == 1 else altair.Color("of:N", legend=None)
    return (
        altair.Chart(altair.Data(values=rows), width=560, height=120)
        .mark_line()
        .encode(
            x=altair.X("step:Q", scale=altair.Scale(zero=False)),
            y=altair.Y("value:Q", title=title, scale=scale),
            color=colour,
        )
    )


def with_plain_values(batch: Any) -> Any:
    """A batch with dicts for mappings of any class, and tensors for arrays."""
    if isinstance(batch, Mapping):
        return {name: with_plain_values(value) for name, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(with_plain_values(value) for value in batch)
    if type(batch).__module__ == "numpy" and hasattr(batch, "dtype"):
        if not batch.shape:
            return batch.item()
        try:
            # Copied, because tensors have no negative strides.
            return torch.as_tensor(batch.copy())
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
