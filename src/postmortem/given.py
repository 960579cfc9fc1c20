"""Checks of what was typed for src.diagnose and src.replay, before PyTorch is imported."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.cli.field_checks import choice, given_path, number
from src.common.errors import InputError, nearest
from src.common.read_checkpoint import STATE, checkpoint_of

FORMATS = ("text", "json")

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true", "16-true")
"""Precisions in which a step can be rerun, by Lightning's names."""

WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""How files with weights end."""

INCIDENT = "runs/<study>/<variant>/seed-<n>/incidents/step-<n>"

MAX_LISTED = 3

DIAGNOSE = ("checkpoint", "batch", "target", "kwargs", "precision", "top", "format")
AUDIT = (
    *("target", "kwargs", "checkpoint", "batch", "dtype", "weights", "inputs", "seconds"),
    *("allow", "folder", "witness", "format"),
)
DTYPES = ("float32", "bfloat16", "float16")
REPLAY = ("incident", "with", "format")


def check_diagnose(given: Mapping[str, Any]) -> None:
    """Raises InputError for a field of src.diagnose that is wrong by itself."""
    _check_names(given, DIAGNOSE)
    choice(given, "format", FORMATS)
    choice(given, "precision", (None, *PRECISIONS))
    number(given, "top", int, least=1)
    _check_kwargs(given)
    saved_file(given_path(given, "checkpoint"))
    _check_file(given, "batch")


def check_audit(given: Mapping[str, Any]) -> None:
    """Raises InputError for a field of src.audit that is wrong by itself."""
    _check_names(given, AUDIT)
    choice(given, "format", FORMATS)
    _check_kwargs(given)
    typed_dtypes(given)
    for field in ("weights", "inputs"):
        number(given, field, float)
        if not 0 < given[field] < float("inf"):
            raise InputError(f"{field}={given[field]}: must be above 0")
    number(given, "seconds", float, least=1)
    allow = given["allow"]
    if not isinstance(allow, Sequence) or isinstance(allow, str):
        raise InputError(f"allow={allow}: must be a list, such as allow=[router.py:61]")
    given_path(given, "folder")
    if given["target"] is None and given["checkpoint"] is None:
        raise InputError("target=null: type target=package.module:callable, or checkpoint=PATH")
    if given["checkpoint"] is not None:
        saved_file(given_path(given, "checkpoint"))
    _check_file(given, "batch")
    _check_file(given, "witness")


def typed_dtypes(given: Mapping[str, Any]) -> list[str]:
    """The precisions of an audit; raises InputError if one is unknown."""
    value = given["dtype"]
    if value is None:
        return list(DTYPES)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, Sequence) or not names:
        raise InputError(f"dtype={value}: must be one of {', '.join(DTYPES)}, or a list of these")
    for name in names:
        if name not in DTYPES:
            raise InputError(f"dtype={name}: must be one of {', '.join(DTYPES)}")
    return list(dict.fromkeys(names))


def _check_kwargs(given: Mapping[str, Any]) -> None:
    """Raises InputError if the arguments of a target are no mapping."""
    kwargs = given["kwargs"]
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs={kwargs}: must be {{name: value}}")
    if kwargs is not None and not all(isinstance(name, str) for name in kwargs):
        raise InputError(f"kwargs={kwargs}: names must be text")


def _check_file(given: Mapping[str, Any], field: str) -> None:
    """Raises InputError if a field names a file that is not there."""
    if given[field] is None:
        return
    file = given_path(given, field)
    if file.is_dir():
        raise InputError(f"{field}={file}: is a folder, must be a file")
    if not file.is_file():
        raise InputError(f"{field}={file}: no such file")


def _check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises InputError for a field that the user added with a plus sign."""
    for name in given:
        if name not in known:
            raise InputError(
                f"{name}: unknown field; {nearest(name, known)}allowed: {', '.join(known)}"
            )


def saved_file(place: Path) -> Path:
    """The file that `checkpoint=` refers to.

    Raises:
        InputError: there is none; the line names those that the folder has.
    """
    if (place / STATE).is_file():
        return place / STATE
    if place.is_dir() and not (place / "config.yaml").is_file():
        found = sorted(f for f in place.iterdir() if f.suffix in WEIGHTS and f.is_file())
        parts = [file for file in found if "-of-" in file.stem]
        whole = [file for file in found if file not in parts]
        if whole:
            # Of a folder that save_pretrained or a Trainer wrote, the others are no weights.
            model = [f for f in whole if f.stem in ("model", "pytorch_model")] or whole
            listed = " or ".join(f"checkpoint={file}" for file in model[:MAX_LISTED])
            raise InputError(f"checkpoint={place}: is a folder; type {listed}")
        if parts:
            raise InputError(
                f"checkpoint={place}: has its weights in {len(parts)} files; save"
                " model.state_dict() as one with torch.save"
            )
        incidents = _incidents_in(place)
        if incidents:
            raise InputError(f"checkpoint={place}: {_listed('checkpoint', incidents)}")
    return checkpoint_of(place, field="checkpoint")


def check_replay(given: Mapping[str, Any]) -> Path:
    """The folder that `incident=` names.

    Raises:
        InputError: a field of src.replay is wrong by itself, or the folder is no incident's.
    """
    _check_names(given, REPLAY)
    choice(given, "format", FORMATS)
    incident = given_path(given, "incident")
    what = f"incident={incident}"
    if (incident / STATE).is_file():
        return incident
    if incident.is_file():
        has_state = (incident.parent / STATE).is_file()
        more = f"type incident={incident.parent}" if has_state else f"it is {INCIDENT}"
        raise InputError(f"{what}: must be the folder of an incident; {more}")
    if not incident.exists():
        raise InputError(f"{what}: no such folder; that of an incident is {INCIDENT}")
    incidents = _incidents_in(incident)
    if incidents:
        raise InputError(f"{what}: {_listed('incident', incidents)}")
    raise InputError(f"{what}: holds no incident; the folder of an incident is {INCIDENT}")


def _incidents_in(place: Path) -> list[Path]:
    """The first incidents in a folder of incidents, of a run, of an arm or of a study."""
    patterns = [f"{'*/' * depth}step-*/{STATE}" for depth in range(4)]
    found = itertools.chain(*(place.glob(pattern) for pattern in patterns))
    return sorted(file.parent for file in itertools.islice(found, 1000))


def _listed(field: str, incidents: list[Path]) -> str:
    shown = " or ".join(f"{field}={place}" for place in incidents[:MAX_LISTED])
    more = len(incidents) - MAX_LISTED
    return f"holds incidents; type {shown}{f'; {more} more' if more > 0 else ''}"
