"""What can be wrong with the fields of src.report, found before anything heavy is imported."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.cli.field_checks import given_path
from src.common.errors import InputError
from src.study.read.find_study import check_has_runs

SOURCES = ("study", "studies", "csv", "mlflow")
"""Where runs come from: this project's folders, a table, or an MLflow experiment."""


def check_report(given: Mapping[str, Any]) -> None:
    """Raises InputError if there is no such study or table, or a column is not named."""
    source = source_of(given)
    if source in ("study", "studies"):
        for name in names_of(given, source):
            check_has_runs(given_path(given, "paths.runs"), name)
        return
    if source == "csv" and not given_path(given, "csv").exists():
        raise InputError(f"csv={given['csv']}: cannot be read (no such file)")
    keys_of(given, source)


def source_of(given: Mapping[str, Any]) -> str:
    """Which of SOURCES is given; raises InputError unless it is one."""
    named = [source for source in SOURCES if given[source] is not None]
    if len(named) != 1:
        shown = " ".join(f"{source}={given[source]}" for source in named) or "study=null"
        raise InputError(
            f"{shown}: name one of study=NAME, studies=[NAME,NAME], csv=FILE and mlflow=EXPERIMENT"
        )
    return named[0]


def names_of(given: Mapping[str, Any], source: str) -> list[str]:
    """The names of the one study, or of the several, that are given; raises InputError."""
    value = given[source]
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if source == "study":
        if is_list:
            listed = ",".join(map(str, value))
            raise InputError(
                f"study=[{listed}]: is one study; type 'studies=[{listed}]' for several"
            )
        return [text_of("study", value)]
    if not is_list:
        raise InputError(f"studies={value}: must be a list, such as 'studies=[stability,hot]'")
    names = list(dict.fromkeys(text_of("studies", name) for name in value))
    if len(names) < 2:
        raise InputError(f"studies={value}: must name two studies or more")
    return names


def keys_of(given: Mapping[str, Any], source: str) -> dict[str, str]:
    """The columns, params or metrics of a source, by field; raises InputError if one lacks."""
    fields = ("arm", "seed", "endpoint")
    for field in fields:
        if given[field] is None:
            what = "column" if source == "csv" else "param, tag or metric"
            raise InputError(f"{field}=null: name the {what} of the {field}")
    return {field: text_of(field, given[field]) for field in fields}


def text_of(field: str, value: Any) -> str:
    """A name or a path, which the command line may have parsed as a number."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise InputError(f"{field}={'null' if value is None else value}: must be text")
