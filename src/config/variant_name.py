"""The name of a variant, which is also its folder."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePath
from typing import Any

from src.common.override_grammar import Override
from src.config.field_roles import role_of

INIT = "init-"
"""Begins the piece of a name that names a saved model."""

FOLDER = "+"
"""Between the folders of its place."""

DEFAULTS = {"model": "proxy", "preset": "laptop"}
"""Choices that a variant's name leaves out; all others are in it, whether typed or preset."""


MAX_PATH = 4096
"""Bytes that a file system takes for a whole path."""

ROOM = 100
"""Bytes that the names of files in a run folder take."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Names of what was chosen."""

    attention: str
    ffn: str
    stability: str
    model: str
    preset: str


def variant_name(variant: Variant, choices: Mapping[Any, Any], typed: Sequence[Override]) -> str:
    """`<attention>+<ffn>+<stability>`, then `@<field>-<value>` for whatever else was chosen."""
    pieces = [f"{variant.attention}+{variant.ffn}+{variant.stability}"]
    # Of a field that is typed twice the last one counts, as it does for Hydra.
    last = {override.key: override for override in typed}
    if "init" in last and last["init"].text == "null":
        del last["init"]
    # What a saved model is, its name says; a model that is not ours has its name as its parts'.
    told = ("model",) if "init" in last or variant.model == variant.attention else ()
    for group, default in DEFAULTS.items():
        if choices[group] != default and group not in told:
            pieces.append(f"{group}-{choices[group]}")
    # Sorted, because the order of typing makes no other variant.
    fields = [last[key] for key in sorted(last) if _is_named(key)]
    shorts = [override.key.rpartition(".")[2] for override in fields]
    for override, short in zip(fields, shorts, strict=True):
        name = short if shorts.count(short) == 1 else override.key
        value = _place(override.text) if name == "init" else _path_safe(override.text)
        pieces.append(f"{name}-{value}")
    name = "@".join(pieces)
    # A file system takes 255 bytes; record and config.yaml say it all.
    return name if len(name) <= 200 else _path_safe(name, limit=200)


def _is_named(key: str) -> bool:
    """Whether a typed field becomes a piece; the choices of a `Variant` have their own places."""
    return role_of(key).named and key not in {field.name for field in dataclasses.fields(Variant)}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of variants without the fields in which none of them differs, for tables."""
    split = {name: fields_of(text) for name, text in without_common_folders(names).items()}
    if len(split) < 2:
        return {name: pieces[0] for name, pieces in split.items()}
    common = set.intersection(*(set(pieces) for pieces in split.values()))
    return {
        name: "@".join(p for p in pieces if p not in common) or pieces[0]
        for name, pieces in split.items()
    }


def fields_of(name: str) -> list[str]:
    """The pieces of a variant's name, attention, ffn and stability first as one."""
    return name.split("@")


def without_common_folders(names: Iterable[str]) -> dict[str, str]:
    """Names whose saved models lie side by side, without the folders above them."""
    split = {name: fields_of(name) for name in names}
    paths = {
        piece: piece.removeprefix(INIT).split(FOLDER)
        for pieces in split.values()
        for piece in pieces
        if piece.startswith(INIT)
    }
    # A name is left of each, whatever they have in common.
    above = zip(*(path[:-1] for path in paths.values()), strict=False)
    num_common = len(list(takewhile(lambda parts: len(set(parts)) == 1, above)))
    short = {piece: INIT + FOLDER.join(path[num_common:]) for piece, path in paths.items()}
    if len(paths) < 2:
        short = {}
    return {name: "@".join(short.get(p, p) for p in pieces) for name, pieces in split.items()}


def _place(path: str) -> str:
    """A path as a piece of a name; where two paths could give one, with six digits of its hash."""
    parts = PurePath(path).parts
    joined = FOLDER.join(part for part in parts if part != "/")
    if path.startswith("/") or any(FOLDER in part for part in parts):
        joined += f"_{hashlib.sha256(path.encode()).hexdigest()[:6]}"
    return _path_safe(joined, limit=80)


def _path_safe(text: str, *, limit: int = 40) -> str:
    """Text as part of a path; what had to be changed is told apart by six digits of its hash."""
    safe = re.sub(r"[^A-Za-z0-9._+@-]+", "_", text).strip("_")[:limit]
    if safe == text:
        return safe
    return f"{safe}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
