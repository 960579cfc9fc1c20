"""The name of a variant, which is also the name of its folder."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath
from typing import Any

from src.common.override_grammar import Override
from src.config.field_roles import role_of

INIT = "init-"
"""Prefix of the piece of a name that stands for a saved model."""

FOLDER = "+"
"""Replaces / in the path of a saved model."""

DEFAULTS = {"model": "proxy", "preset": "laptop"}
"""Choices that a name leaves out. Any other choice of these groups is part of the name."""


MAX_PATH = 4096
"""Longest path in bytes that a file system accepts."""

ROOM = 100
"""Bytes reserved for the names of files below a run folder."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The selected options that always identify a variant, by name."""

    attention: str
    ffn: str
    stability: str
    model: str
    preset: str


def variant_of(choices: Mapping[Any, Any], remedies: Iterable[str]) -> Variant:
    """The variant of the options selected in each group and of the remedies that are on."""
    return Variant(
        attention=str(choices["attention"]),
        ffn=str(choices["ffn"]),
        stability="-".join(sorted(remedies)) or "none",
        model=str(choices["model"]),
        preset=str(choices["preset"]),
    )


def run_folder(runs: str, study: str, name: str, *, seed: int, repeat: int) -> Path:
    """`<runs>/<study>/<variant>/seed-<n>`, with `-repeat-<r>` unless the repeat is 0."""
    run = f"seed-{seed}" + (f"-repeat-{repeat}" if repeat else "")
    return Path(runs) / study / name / run


def variant_name(variant: Variant, choices: Mapping[Any, Any], typed: Sequence[Override]) -> str:
    """`<attention>+<ffn>+<stability>`, then `@<field>-<value>` for each other typed field."""
    pieces = [f"{variant.attention}+{variant.ffn}+{variant.stability}"]
    # If a field is typed twice, the last value counts, as in Hydra.
    last = {override.key: override for override in typed}
    if "init" in last and last["init"].text == "null":
        del last["init"]
    # The piece of `init` already identifies the model. An external model's name is already there as
    # that of its attention and ffn.
    is_model_named = "init" in last or variant.model == variant.attention
    for group, default in DEFAULTS.items():
        if choices[group] != default and not (group == "model" and is_model_named):
            pieces.append(f"{group}-{choices[group]}")
    # Sorted, because the order of typing must not change the name.
    fields = [last[key] for key in sorted(last) if _is_named(key)]
    shorts = [override.key.rpartition(".")[2] for override in fields]
    for override, short in zip(fields, shorts, strict=True):
        name = short if shorts.count(short) == 1 else override.key
        value = _init_piece(override.text) if name == "init" else _path_safe(override.text)
        pieces.append(f"{name}-{value}")
    name = "@".join(pieces)
    # File systems accept names of at most 255 bytes; config.yaml holds all typed arguments.
    return name if len(name) <= 200 else _path_safe(name, limit=200)


def _is_named(key: str) -> bool:
    """Whether a typed field becomes a piece of its own; the fields of `Variant` do not."""
    return role_of(key).named and key not in {field.name for field in dataclasses.fields(Variant)}


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Short names for tables, without the pieces that all variants have in common."""
    split = {name: fields_of(text) for name, text in without_common_folders(names).items()}
    if len(split) < 2:
        return {name: pieces[0] for name, pieces in split.items()}
    common = set.intersection(*(set(pieces) for pieces in split.values()))
    return {
        name: "@".join(p for p in pieces if p not in common) or pieces[0]
        for name, pieces in split.items()
    }


def fields_of(name: str) -> list[str]:
    """The pieces of a variant's name; the first is `<attention>+<ffn>+<stability>`."""
    return name.split("@")


def without_common_folders(names: Iterable[str]) -> dict[str, str]:
    """Names without the parent folders that the paths of their saved models have in common."""
    split = {name: fields_of(name) for name in names}
    paths = {
        piece: piece.removeprefix(INIT).split(FOLDER)
        for pieces in split.values()
        for piece in pieces
        if piece.startswith(INIT)
    }
    # The last part is left out, so that each path keeps at least its own name.
    above = zip(*(path[:-1] for path in paths.values()), strict=False)
    num_common = len(list(takewhile(lambda parts: len(set(parts)) == 1, above)))
    short = {piece: INIT + FOLDER.join(path[num_common:]) for piece, path in paths.items()}
    if len(paths) < 2:
        short = {}
    return {name: "@".join(short.get(p, p) for p in pieces) for name, pieces in split.items()}


def _init_piece(path: str) -> str:
    """A path as a piece of a name.

    A path that could give the same piece as another gets six digits of its hash.
    """
    parts = PurePath(path).parts
    joined = FOLDER.join(part for part in parts if part != "/")
    if path.startswith("/") or any(FOLDER in part for part in parts):
        joined += f"_{hashlib.sha256(path.encode()).hexdigest()[:6]}"
    return _path_safe(joined, limit=80)


def _path_safe(text: str, *, limit: int = 40) -> str:
    """Text as part of a path; if it had to be changed, six digits of its hash keep it distinct."""
    safe = re.sub(r"[^A-Za-z0-9._+@-]+", "_", text).strip("_")[:limit]
    if safe == text:
        return safe
    return f"{safe}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
