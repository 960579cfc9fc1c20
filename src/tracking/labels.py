"""The tags and params of runs and sweeps in MLflow."""

import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from src.config.field_roles import role_of

PARENT = "mlflow.parentRunId"
"""The tag by which MLflow nests runs."""


def host() -> str:
    """The name of this machine, which alone can see the locks of its processes."""
    return socket.gethostname()


def variant_of(config: Mapping[str, Any]) -> dict[str, str]:
    """attention, ffn, stability, model and preset by name, from the content of config.yaml."""
    choices = config["choices"]
    return {
        "attention": str(choices["attention"]),
        "ffn": str(choices["ffn"]),
        "stability": "-".join(sorted(config["stability"])) or "none",
        "model": str(choices["model"]),
        "preset": str(choices["preset"]),
    }


def axes(config: Mapping[str, Any]) -> dict[str, str]:
    """The variant, seed and repeat, which distinguish the runs of a study."""
    return variant_of(config) | {name: str(config[name]) for name in ("seed", "repeat")}


def is_measured_by(metric: str, remedies: Iterable[str]) -> bool:
    """Whether one of these remedies has logged a metric."""
    return any(metric.startswith((f"val_{r}/", f"stability/{r}_")) for r in remedies)


def run_tags(
    config: Mapping[str, Any], folder: Path, *, facts: Mapping[str, Any]
) -> dict[str, str]:
    """The tags of a run.

    Args:
        config: the content of config.yaml.
        folder: the run folder.
        facts: git_sha, git_dirty, versions and device as in record.json; unknown ones are absent.
    """
    run_axes = axes(config)
    tags = {
        **run_axes,
        "kind": "run",
        "config_hash": config["config_hash"],
        "baseline": str(run_axes["stability"] == "none").lower(),
        "run_folder": folder.resolve(),
        "host": host(),
        **{name: facts[name] for name in ("git_sha", "git_dirty") if name in facts},
        **{f"version.{name}": value for name, value in facts.get("versions", {}).items()},
        **{f"device.{name}": value for name, value in facts.get("device", {}).items()},
    }
    sweep_id = config["tracking"].get("sweep_id")
    if sweep_id is not None:
        tags["sweep_id"] = sweep_id
    return {name: str(value) for name, value in tags.items()}


def sweep_tags(folder: Path, *, command: str, description: str) -> dict[str, str]:
    """The tags of a sweep, whose folder is runs/<study>/.sweeps/<sweep_id>."""
    return {
        "kind": "sweep",
        "sweep_id": folder.name,
        "command": command,
        "mlflow.note.content": description,
        "run_folder": str(folder.resolve()),
        "host": host(),
    }


def run_params(config: Mapping[str, Any]) -> dict[str, str]:
    """The params of a run: its axes, and all fields of config.yaml that distinguish runs, flat.

    Other fields, such as the typed arguments, are left out: in MLflow's tables they would hide what
    distinguishes the arms.
    """
    flat = _flat({name: value for name, value in config.items() if role_of(name).is_param})
    return {name: str(value) for name, value in flat.items()} | axes(config)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        name = f"{prefix}.{key}" if prefix else key
        flat |= _flat(inner, name) if isinstance(inner, dict) else {name: inner}
    return flat
