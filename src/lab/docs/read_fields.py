"""What the source says about fields: docstrings of dataclasses, and comments in conf/."""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.config.hydra_compose import CONF

REQUIRED = "???"
"""The value in YAML of a field that must be typed."""


def docstrings(config: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, inherited ones too, on one line each."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        try:
            (node,) = ast.parse(inspect.cleandoc(inspect.getsource(owner))).body
        except OSError:  # made by make_dataclass: has no source
            continue
        assert isinstance(node, ast.ClassDef)
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                value = ast.literal_eval(following.value)
                found[ast.unparse(statement.target)] = " ".join(str(value).split())
    return found


@functools.cache
def comments(file: Path) -> dict[str, str]:
    """The comment directly above each key of a YAML file, by dotted key, on one line each."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    block: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text.startswith("#"):
            block.append(text.removeprefix("#").strip())
            continue
        key = re.match(r"( *)([A-Za-z_]\w*):", line)
        if key is not None:
            indent = len(key[1])
            path = [*((i, name) for i, name in path if i < indent), (indent, key[2])]
            if block:
                found[".".join(name for _, name in path)] = " ".join(block)
        block = []
    return found


def heading(file: Path) -> str:
    """The comment at the head of a YAML file, on one line."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def first_sentence(text: str) -> str:
    """The text up to its first full stop, without that."""
    return re.split(r"(?<!\.)\.(?:\s|$)", text, maxsplit=1)[0]


def options(group: str) -> list[str]:
    """The options of a group, by name."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@functools.cache
def values_set_by(group: str, option: str) -> dict[str, Any]:
    """The fields that the file of an option sets, and those that it builds on, by dotted name."""
    file = CONF / group / f"{option}.yaml"
    raw = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(raw, dict)
    found: dict[str, Any] = {}
    for entry in raw.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_" and "/" not in entry:
            found |= values_set_by(group, entry)
    is_global = file.read_text(encoding="utf-8").startswith("# @package _global_")
    own = raw if is_global or group == "stability" else {group: raw}
    prefix = "stability." if group == "stability" else ""
    return found | {f"{prefix}{name}": value for name, value in leaves(own).items()}


def leaves(values: Mapping[Any, Any], above: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted name; an empty mapping counts as a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{name}.")
        else:
            found[name] = value
    return found


def typed_value(value: Any) -> str:
    """A value as a user types it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(typed_value, value))}]"
    text = str(value)
    return text[2:-1] if text.startswith("${") else text
