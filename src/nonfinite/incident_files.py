"""The files of an incident: values that can be saved safely, and its HTML page."""

import html
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

STYLE = """
:root { color-scheme: light dark; --ink: #222222; --muted: #5f6368; --rule: #d5d7da;
        --paper: #ffffff; --shade: #f6f6f3; --alert: #fdf3ec; --vermillion: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7e9; --muted: #a4a9b0; --rule: #3a3e44;
        --paper: #17191c; --shade: #212428; --alert: #33241b; --vermillion: #f0793a; } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 48rem; margin: 1.5rem auto 3rem; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .6rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; padding-top: .7rem;
     border-top: 1px solid var(--rule); }
p { margin: .4rem 0; }
code, pre { font: .9rem/1.5 ui-monospace, Menlo, Consolas, monospace; background: var(--shade); }
code { padding: .1rem .3rem; border-radius: .2rem; }
pre { padding: .7rem .9rem; overflow-x: auto; overflow-wrap: normal; margin: .4rem 0; }
pre.code { white-space: pre-wrap; }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--muted); }
.cause { border-left: 4px solid var(--vermillion); background: var(--alert);
         padding: .6rem 1rem; margin: .8rem 0; }
.cause p:first-child { font-size: 1.1rem; font-weight: 600; }
.quiet { color: var(--muted); font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .4rem 0; }
dt { color: var(--muted); } dd { margin: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--rule); }
summary { cursor: pointer; color: var(--muted); margin: .6rem 0; }
.phone { display: none; }
@media (max-width: 640px) { .wide { display: none; } .phone { display: block; }
        h1 { font-size: 1.35rem; } }
"""

GREY = "#808080"
"""Readable on white and on black."""

NUM_LAST = 10
"""The number of steps that are shown in numbers."""

_folders: set[Path] = set()
"""Folders in which this process has saved incidents."""

WIDTHS = {"wide": 620, "phone": 280}
"""The widths of the curves in pixels, by the class of the page's style that shows them."""


def new_folder(parent: Path, step: int) -> Path:
    """A folder for an incident, which no other incident of this process has."""
    folder, number = parent / f"step-{step}", 2
    while folder.absolute() in _folders:
        folder = parent / f"step-{step}-{number}"
        number += 1
    _folders.add(folder.absolute())
    return folder


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
    source, helps = incident["source"], incident["advice"]
    code = ""
    if source is not None:
        place = html.escape(f"{source['file']}, line {source['line']}")
        code = (
            f"<pre class='code'>{html.escape(source['code'])}</pre>\n<p class='quiet'>{place}</p>"
        )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Incident in step {incident["step"]}</title><style>{STYLE}</style></head><body>
<h1>Step {incident["step"]}: {html.escape(incident["cause"])}</h1>
<div class="cause">
<p>{html.escape(incident["explanation"])}</p>
{"" if helps is None else f"<p>What usually helps: {html.escape(helps)}.</p>"}
</div>
{code}
{_facts(incident)}
<h2>Before this step</h2>
{_curves(ring)}
<h2>Run it again</h2>
<p>{advice}</p>
<h2>Details</h2>
<p>{html.escape(incident["line"])}</p>
{_last_steps(ring)}
<details><summary>All values</summary>
<pre>{html.escape(_compact(json_safe(shown)))}</pre>
</details>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _facts(incident: Mapping[str, Any]) -> str:
    """Where it failed, and what the reruns say, as a list of terms."""
    facts = {
        "phase": incident["phase"],
        "module": incident["module"],
        "operation": incident["operation"],
        "rerun": _rerun_words(incident),
    }
    terms = (
        f"<dt>{name}</dt><dd>{html.escape(str(fact))}</dd>" for name, fact in facts.items() if fact
    )
    return f"<dl>{''.join(terms)}</dl>"


def _last_steps(ring: Sequence[Mapping[str, float]]) -> str:
    """The last steps before the incident in numbers, as a table that opens at a click."""
    names = [name for name in ("loss", "grad_norm") if ring and name in ring[-1]]
    if not names:
        return ""
    heads = "".join(f"<th>{name.replace('grad_norm', 'gradient norm')}</th>" for name in names)
    rows = [
        "".join(f"<td>{entry.get(name, math.nan):.6g}</td>" for name in names)
        for entry in ring[-NUM_LAST:]
    ]
    steps = [f"<tr><td>{entry['step']:g}</td>" for entry in ring[-NUM_LAST:]]
    body = "".join(f"{step}{row}</tr>" for step, row in zip(steps, rows, strict=True))
    return (
        "<details><summary>The last steps in numbers</summary>"
        f"<table><tr><th>step</th>{heads}</tr>{body}</table></details>"
    )


def _compact(value: Any) -> str:
    """JSON with an entry per line; what holds no further mapping stays on one line."""
    if isinstance(value, dict) and value:
        inner = ",\n".join(f"{json.dumps(key)}: {_compact(each)}" for key, each in value.items())
        return "{\n" + textwrap.indent(inner, "  ") + "\n}"
    return json.dumps(value)


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

    try:
        import vl_convert
    except ImportError:
        return "<p>Install vl-convert-python to see curves.</p>"
    drawn = []
    for style, width in WIDTHS.items():
        chart = altair.vconcat(*_panels(altair, ring, width), spacing=12)
        chart = chart.configure(background="transparent", font="Arial, Helvetica, sans-serif")
        chart = chart.configure_title(
            anchor="start", fontSize=12, fontWeight="normal", color=GREY, offset=4
        )
        chart = chart.configure_view(stroke=None).configure_axis(
            **{"labelColor": GREY, "titleColor": GREY, "gridColor": GREY, "domainColor": GREY},
            **{"tickColor": GREY, "gridOpacity": 0.2, "labelFontSize": 12, "titleFontSize": 12},
            titleFontWeight="normal",
        )
        # A test validates the charts; that takes as long as drawing them.
        svg = vl_convert.vegalite_to_svg(chart.to_dict(validate=False))
        drawn.append(f'<div class="{style}">{svg}</div>')
    return "\n".join(drawn)


def _panels(altair: Any, ring: Sequence[Mapping[str, float]], width: int) -> list[Any]:
    """One panel for each kind of metric; the last has the title of the common axis."""
    biases = [key for key in ring[-1] if key.startswith("bias_mean/")]
    kinds = [(["loss"], "loss", False)] if "loss" in ring[-1] else []
    kinds.append((["grad_norm"], "gradient norm", True))
    kinds += [(biases, "mean router bias", False)] if biases else []
    last = kinds[-1][1]
    return [
        _panel(
            altair, ring, keys, title, log=log, width=width, below="step" if title == last else None
        )
        for keys, title, log in kinds
    ]


def _panel(
    altair: Any,
    ring: Sequence[Mapping[str, float]],
    keys: list[str],
    title: str,
    *,
    log: bool,
    width: int,
    below: str | None,
) -> Any:
    """One curve for each key; a logarithmic axis leaves out what is not positive."""
    rows = [
        {"step": entry["step"], "value": entry[key], "of": key.partition("/")[2] or key}
        for key in keys
        for entry in ring
        if key in entry and math.isfinite(entry[key]) and (entry[key] > 0 or not log)
    ]
    scale = altair.Scale(type="log" if log else "linear", zero=False)
    steps = altair.Axis(tickCount=max(3, width // 90), grid=False)
    # A logarithmic axis has a line for every digit.
    values = altair.Axis(tickCount=4, grid=not log)
    colour = altair.value("#3a9bd9") if len(keys) == 1 else altair.Color("of:N", legend=None)
    return (
        altair.Chart(altair.Data(values=rows), width=width, height=110, title=title)
        .mark_line(strokeWidth=1.6)
        .encode(
            x=altair.X("step:Q", title=below, axis=steps, scale=altair.Scale(zero=False)),
            y=altair.Y("value:Q", title=None, scale=scale, axis=values),
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
