"""The page of MLflow that compares the arms of a study.

MLflow's own start page of an experiment shows a sweep as one collapsed row without a metric. A
shared view, which MLflow keeps in a tag of the experiment, replaces it: all runs by arm, with the
columns and charts below. Its address is short, and works for everybody who can open the server.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from src.config.variant_name import fields_of
from src.tracking.client import KIND, MODEL_TRAINING, Server
from src.tracking.push_state import milliseconds

VIEW = "arms"
"""The name of the view in addresses."""
TAG = f"mlflow.sharedViewState.{VIEW}"

ARM_TAGS = ("arm", "arm.2", "arm.3", "arm.4", "arm.5", "arm.6")
"""The tags that can hold the label of a run's arm, see `_arm_tag`."""

MENU = "workflowType=machine_learning"
"""Without this in an address, MLflow's menus and pages are the ones for chats."""
TABLE_QUERY = f"viewStateShareKey={VIEW}&{MENU}"
CHARTS_QUERY = f"compareRunsMode=CHART&{TABLE_QUERY}"

REPORT = "report"
"""Folder of the artifacts of a sweep."""

RUNS = "tags.kind = 'run'"
"""Selects the runs without their sweeps: MLflow then shows a flat table, unfolded."""

RESULTS = (
    "val_loss",
    "nonfinite_steps",
    "first_nonfinite_step",
    "skipped_steps",
    "spikes",
    "grad_norm_max",
    "steps",
    "seconds",
    "tokens_per_second",
)
"""The columns with results, in order; others can be added on the page."""

CURVES = {
    "train/loss": "linear",
    "val/loss": "linear",
    "grad/norm": "log",
    "guard/nonfinite_grad": "linear",
}
"""The metrics that are drawn over steps, and their scales; MLflow takes their names as titles."""

BARS = ("result/nonfinite_steps", "result/val_loss")
"""The metrics that are drawn as a bar per arm."""

NUM_COLOURS = 29
"""The number of colours that MLflow's charts have."""

NAME_COLUMN = "attributes.`Run Name`"

MAIN = "Arms compared"
"""The name of the view in menus, and of the charts at its top."""


class NoRunsError(LookupError):
    """There is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class CompareView:
    """Where MLflow's pages compare the arms of a study."""

    experiment_id: str
    sweep_run_id: str | None
    """The latest sweep of the study; its description holds the report's answer."""

    def links(self) -> dict[str, str]:
        """Links within MLflow's pages, by what they lead to."""
        experiment = f"#/experiments/{self.experiment_id}"
        found = {
            "arms compared": f"{experiment}/runs?{CHARTS_QUERY}",
            "table of runs": f"{experiment}/runs?{TABLE_QUERY}",
        }
        if self.sweep_run_id is not None:
            sweep = f"{experiment}/runs/{self.sweep_run_id}"
            found["answer"] = f"{sweep}?{MENU}"
            found["report"] = f"{sweep}/artifacts/{REPORT}/report.html?{MENU}"
        return found


def write_view(server: Server, study: str) -> CompareView:
    """Writes the view of a study, for the runs that MLflow has.

    Raises:
        NoRunsError: MLflow has no run of this study.
        Exception: whatever MLflow raises.
    """
    runs = server.search(study, RUNS)
    if not runs:
        raise NoRunsError(f"MLflow at {server.uri} has no run of it")
    labels = arm_labels([_variant(run) for run in runs])
    arm_tag = _arm_tag(labels.values())
    for run in runs:
        label = labels[_variant(run)]
        if run.data.tags.get(arm_tag) != label:
            server.client.set_tag(run.info.run_id, arm_tag, label)
    tags = {
        # Without it, an experiment of an early version opens on MLflow's pages for chats.
        KIND: MODEL_TRAINING,
        TAG: packed(view_state(runs, arm_tag)),
    }
    experiment_id = server.experiment_id(study)
    for name, value in tags.items():
        server.client.set_experiment_tag(experiment_id, name, value)
    sweeps = server.search(study, "tags.kind = 'sweep'")
    latest = max(sweeps, key=lambda run: run.info.start_time, default=None)
    return CompareView(
        experiment_id=experiment_id,
        sweep_run_id=None if latest is None else str(latest.info.run_id),
    )


def view_state(runs: Sequence[Any], arm_tag: str) -> dict[str, Any]:
    """The state of MLflow's page: filter, order, columns, groups, charts.

    Args:
        runs: the runs of the study, as MLflow returns them.
        arm_tag: the tag that holds the label of a run's arm.
    """
    columns = _columns(runs)
    return {
        "searchFilter": RUNS,
        # The order in which a sweep trains its arms: the baseline comes first. The backticks
        # matter: MLflow adds the sweeps again if the order is that of its own start page.
        "orderByKey": "attributes.`start_time`",
        "orderByAsc": True,
        "selectedColumns": list(columns),
        # The first two are the check box and the run's name.
        "columnOrder": ["0", NAME_COLUMN, *columns],
        "columnWidths": {"0": 50, NAME_COLUMN: 220, **columns},
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": arm_tag}],
        },
        "useGroupedValuesInCharts": True,
        "runsHiddenMode": "SHOW_ALL",
        "isAccordionReordered": True,
        "compareRunSections": _sections(runs),
        "compareRunCharts": _charts(),
    }


def _variant(run: Any) -> str:
    """The name of a run's variant, which is that of its folder's parent."""
    return PurePath(run.data.tags["run_folder"]).parent.name


def arm_labels(variants: Iterable[str]) -> dict[str, str]:
    """Short labels of arms: the pieces of their names that not all arms share.

    `mlha+moe+clip03@preset-crash` is `clip03` if all arms have the same attention, ffn and preset.
    """
    pieces = {name: [*fields_of(name)[0].split("+"), *fields_of(name)[1:]] for name in variants}
    shared = set.intersection(*map(set, pieces.values()))
    stability = 2
    labels = {}
    for name, own in pieces.items():
        left = [piece for piece in own if piece not in shared]
        if len(own) > stability and own[stability] not in left:
            left.insert(0, own[stability])
        labels[name] = " ".join(left) or name
    return labels


def _arm_tag(labels: Iterable[str]) -> str:
    """The tag to group by.

    MLflow derives the colour of a group from the names of the tag and the group, and nothing can
    set it. So this takes the tag with which the arms have the most colours.
    """
    groups = set(labels)
    return max(ARM_TAGS, key=lambda tag: len({_colour(f"tag.{tag}.{name}") for name in groups}))


def _colour(group: str) -> int:
    """The number of the colour that MLflow gives to a group."""
    low = high = 0
    for letter in group:
        low = (low + ord(letter)) % 255
        high = (high + low) % 255
    return (low | high << 8) % NUM_COLOURS


def packed(state: Any) -> str:
    """A state as MLflow keeps it in a tag: with the name that its menu of views shows."""
    text = json.dumps(state, separators=(",", ":"))
    shrunk = f"deflate;{base64.b64encode(zlib.compress(text.encode(), 9)).decode()}"
    return json.dumps({"name": MAIN, "createdAt": milliseconds(), "state": shrunk})


def _columns(runs: Iterable[Any]) -> dict[str, int]:
    """The names of the columns and their widths in pixels."""
    known = {name for run in runs for name in run.data.metrics}
    results = [f"result/{name}" for name in RESULTS]
    return {
        "tags.`seed`": 65,
        "tags.`outcome`": 110,
        **{f"metrics.`{name}`": 125 for name in results if name in known},
        "tags.`incident`": 160,
    }


def _sections(runs: Iterable[Any]) -> list[dict[str, Any]]:
    """Ours is open; those that MLflow makes for other metrics stay closed until a click."""
    groups = {name.rpartition("/")[0] for run in runs for name in run.data.metrics}
    names = [MAIN, *sorted(groups - {""})]
    return [
        {
            "uuid": f"section-{name}",
            "name": name,
            "display": name == MAIN,
            "isReordered": name == MAIN,
            "deleted": False,
            "isGenerated": False,
        }
        for name in names
    ]


def _charts() -> list[dict[str, Any]]:
    curves = [
        _chart(
            metric,
            type="LINE",
            selectedMetricKeys=[metric],
            scaleType=scale,
            xAxisKey="step",
            xAxisScaleType="linear",
            yAxisKey="metric",
            yAxisExpressions=[],
            range={},
            lineSmoothness=0,
            selectedXAxisMetricKey="",
            ignoreOutliers=False,
            useGlobalXaxisKey=True,
            useGlobalLineSmoothing=True,
        )
        for metric, scale in CURVES.items()
    ]
    return curves + [_chart(metric, type="BAR") for metric in BARS]


def _chart(metric: str, **fields: Any) -> dict[str, Any]:
    """What all kinds of charts have in common, and the fields of one kind."""
    return {
        "uuid": f"chart-{metric}",
        "metricKey": metric,
        "metricSectionId": f"section-{MAIN}",
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
        **fields,
    }
