"""What the user typed: Hydra's override grammar, with free text quoted for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride

GROUPS = (
    "attention",
    "ffn",
    "stability",
    "model",
    "data",
    "tokenizer",
    "preset",
    "trainer",
    "tracking",
)
"""Fields whose value is the name of a file in conf/<field>/."""

FREE_TEXT = (
    "incident",
    "checkpoint",
    "batch",
    "job",
    "run",
    "source",
    "calibration",
    "prompts_file",
    "data.path",
    "data.val_path",
    "data.url",
    "tokenizer.path",
    "paths.runs",
    "paths.cache",
    "resume",
    "init",
    "fork",
    "out",
    "tracking.uri",
    "tracking.sweep_id",
    "tracking.parent_run_id",
)
"""Fields that take any text, so that nobody has to know Hydra's escapes."""

SWEPT_TEXT = ("init",)
"""Those of them that a sweep takes several of, with commas between."""

OPEN = {"model=external": "model.kwargs"}
"""Fields below which any name may be typed, by the choice that has them."""

_DECIDED = ("[", "'", '"', "${", "choice(")
"""A value that begins so is taken to be written in Hydra's grammar already."""


@dataclass(frozen=True, kw_only=True)
class Override:
    """One `key=value` of the command line."""

    key: str
    """Dotted field or group, without the grammar's + and ~."""
    text: str
    """The value as it was typed."""


def quote_free_text(argument: str) -> str:
    """Puts the value of a free-text field into quotes for Hydra's parser."""
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT or not value:
        return argument
    if key in SWEPT_TEXT and "," in value and not value.startswith(_DECIDED):
        return f"{key}={','.join(_quoted(part.strip()) for part in value.split(','))}"
    return f"{key}={_quoted(value)}"


def allow_new_names(arguments: Sequence[str]) -> list[str]:
    """The same, with those below an open field told to Hydra to be added."""
    fields = [field for choice, field in OPEN.items() if choice in arguments]

    def is_open(argument: str) -> bool:
        key = argument.partition("=")[0]
        return any(key == field or key.startswith(f"{field}.") for field in fields)

    return [f"++{argument}" if is_open(argument) else argument for argument in arguments]


def _quoted(value: str) -> str:
    if value.startswith(_DECIDED) or value == "null":
        return value
    stem = value.rstrip("\\")
    trailing = len(value) - len(stem)
    # The grammar unescapes backslashes only before a quote.
    escaped = stem.replace("\\'", "\\\\'").replace("'", "\\'") + "\\" * (2 * trailing)
    return f"'{escaped}'"


def parse(arguments: Sequence[str]) -> list[Override]:
    """The overrides in the order typed; raises Hydra's OverrideParseException."""
    parsed = OverridesParser.create().parse_overrides(list(arguments))
    return [Override(key=_key(o), text=_text(o)) for o in parsed]


def _key(override: HydraOverride) -> str:
    return override.key_or_group


def _text(override: HydraOverride) -> str:
    value = override.value()
    if isinstance(value, list):
        return f"[{','.join(map(_plain, value))}]"
    return _plain(value)


def _plain(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
