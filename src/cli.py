"""The way into every command: quoting, composing, errors in one line, exit codes.

Exit codes: 0 done, 1 failure, 2 bad input, 130 Ctrl-C, 143 terminated.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import hydra.errors
import omegaconf.errors
from hydra.core.override_parser.overrides_parser import OverridesParser

from src import startup, storage, terminal
from src.composed import compose_plain
from src.config import RunConfig, compose
from src.errors import InputError, nearest
from src.overrides import GROUPS, parse, quote_free_text
from src.schema import CONF
from src.stability import REMEDIES
from src.tracking.address import masked, take_typed

OK, FAILURE, BAD_INPUT = 0, 1, 2

COMPOSED = ("train", "describe")
"""Commands that compose a run; all others have fields of their own."""

SWEEP_FIELDS = ("experiment", "n_jobs", "timeout", "share_prefix", "plan")
"""Fields of conf/sweep.yaml, which belong to a sweep and to none of its cells."""

NOT_OFFERED = {
    "trainer=fsdp": "weights in shards are not offered, because a step that failed is run again by"
    " each process for itself, with whole weights; "
}
"""Options that people ask for, and why there are none."""

_HYDRA_FLAGS = ("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i")
_GRAMMAR_HINT = "arguments have the form field=value; values with blanks or signs need quotes"


def is_sweep_field(argument: str) -> bool:
    """Whether an argument is for the sweep, or for Hydra's launcher, and not for its cells."""
    key = argument.partition("=")[0].lstrip("+~").strip()
    return key in SWEEP_FIELDS or key.startswith(("hydra/launcher", "hydra.launcher"))


def main(
    config_name: str,
    command: Callable[[RunConfig], int],
    *,
    usage: str,
    sweep: Callable[[str, Sequence[str]], int] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command and returns its exit code.

    Args:
        config_name: its file in conf/.
        command: what to do with a checked configuration.
        usage: the text of --help.
        sweep: what to do with --multirun, given config name and arguments; None: refuse it.
        argv: arguments; None: those of the process.
    """

    def act(arguments: list[str], multirun: bool) -> int:
        if not multirun:
            return command(checked(config_name, arguments))
        if sweep is None:
            raise InputError(f"--multirun: is not for src.{config_name}")
        return sweep(config_name, arguments)

    return _main(act, usage=usage, argv=argv)


def plain_main(
    config_name: str,
    command: Callable[[dict[str, Any]], int],
    *,
    usage: str,
    verbatim: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> int:
    """The same for a command whose fields are its own, handed over as plain values.

    Args:
        config_name: its file in conf/.
        command: what to do with the values.
        usage: the text of --help.
        verbatim: fields whose value is text as it was typed, whatever it would mean to Hydra.
        argv: arguments; None: those of the process.
    """
    texts: dict[str, Any] = {}
    others = []
    for argument in sys.argv[1:] if argv is None else argv:
        key, equals, text = argument.partition("=")
        if equals and key in verbatim:
            texts[key] = text
        else:
            others.append(argument)

    def act(arguments: list[str], multirun: bool) -> int:
        if multirun:
            raise InputError(f"--multirun: is not for src.{config_name}")
        _check_read([f"{field}={text}" for field, text in texts.items()])
        with readable(config_name, arguments):
            for override in OverridesParser.create().parse_overrides(arguments):
                if override.is_sweep_override():
                    raise InputError(f"{override.input_line}: takes one value here")
                if override.key_or_group in verbatim:
                    raise InputError(
                        f"{override.input_line}: fields are set as field=value, without + and ~"
                    )
            return command(compose_plain(config_name, arguments) | texts)

    return _main(act, usage=usage, argv=others)


def _main(act: Callable[[list[str], bool], int], *, usage: str, argv: Sequence[str] | None) -> int:
    startup.imports_are_done()
    raw = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a letter, as in the locale C, gets its code, as on standard error.
        sys.stdout.reconfigure(errors="backslashreplace")
    given = [argument for argument in raw if argument not in ("-m", "--multirun")]
    multirun = len(given) < len(raw)
    if any(argument in ("--help", "-h") for argument in given):
        terminal.say(usage.strip())
        return OK
    try:
        _check_read(given)
        # First of all, so that no message and no file repeats what is secret in an address.
        typed = [take_typed(argument) for argument in given]
        flags = [argument for argument in typed if argument.startswith("-")]
        if flags:
            raise InputError(f"{flags[0]}: unknown flag; {_GRAMMAR_HINT}")
        arguments = [quote_free_text(argument) for argument in typed]
        return act(arguments, multirun)
    except InputError as error:
        # An address may also stand where none belongs.
        terminal.error(masked(str(error)))
        return BAD_INPUT
    except OSError as error:
        # Of the environment by its kind; what a user can mend is turned into an InputError below.
        terminal.error(masked(storage.trouble(error)))
        return FAILURE


def _check_read(arguments: Sequence[str]) -> None:
    """Raises InputError where Python could not read the bytes of an argument in this locale."""
    for argument in arguments:
        # It puts halves of characters in their place, which nothing can write.
        if any("\ud800" <= letter <= "\udfff" for letter in argument):
            raise InputError(
                f"{ascii(argument)[1:-1]}: holds bytes that are not text in this locale;"
                " LC_ALL=C.UTF-8 reads UTF-8"
            )


def checked(config_name: str, arguments: Sequence[str]) -> RunConfig:
    """`compose`, with every way in which input can be bad turned into an InputError."""
    with readable(config_name, arguments):
        for override in OverridesParser.create().parse_overrides(list(arguments)):
            if override.is_add() or override.is_force_add() or override.is_delete():
                raise InputError(
                    f"{override.input_line}: fields are set as field=value, without + and ~"
                )
            if is_sweep_field(override.input_line or ""):
                raise InputError(
                    f"{override.input_line}: is a field of sweeps; add --multirun to have one"
                )
            if override.key_or_group.startswith("hydra"):
                raise InputError(f"{override.input_line}: Hydra's own settings are fixed here")
            if override.is_sweep_override():
                raise InputError(
                    f"{override.input_line}: has several values; add --multirun to run each"
                )
        return compose(config_name, arguments)


@contextlib.contextmanager
def readable(config_name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise inside into an InputError of one line."""
    try:
        yield
    except hydra.errors.MissingConfigException as error:
        raise _unknown_option(error) from error
    except hydra.errors.OverrideParseException as error:
        raise InputError(f"{error.override}: cannot be read; {_GRAMMAR_HINT}") from error
    except (hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _bad_field(config_name, error, arguments) from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            # Python reads no integer of more than 4300 digits.
            raise InputError("an argument holds an integer of more than 64 bits") from error
        if str(error).startswith("Config group override"):
            given = [a for a in arguments if a.partition("=")[0] in GROUPS]
            raise InputError(
                f"{' '.join(given)}: a group takes the name of an option, stability a list too"
            ) from error
        raise
    except AssertionError as error:
        # So OmegaConf answers a field of an option that is null.
        for override in parse(arguments):
            section, _, field = override.key.partition(".")
            option = field.partition(".")[0]
            if section == "stability" and option:
                raise InputError(
                    f"{override.key}={override.text}: stability={option} is not on"
                    f" (allowed: stability=<one or a list of {', '.join(REMEDIES)}>)"
                ) from error
        raise


def _unknown_option(error: hydra.errors.MissingConfigException) -> InputError:
    """A group has no such option: name the nearest and list all."""
    # An address may stand in place of the option.
    group, _, option = masked(str(error.missing_cfg_file)).rpartition("/")
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml")) if group else []
    why = NOT_OFFERED.get(f"{group}={option}", f"unknown option; {nearest(option, options)}")
    return InputError(f"{group}={option}: {why}allowed: {', '.join(options)}")


def _bad_field(config_name: str, error: Exception, arguments: Sequence[str]) -> InputError:
    """An unknown field, a value of the wrong type, or a value that is missing."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    text = "\n".join(str(entry) for entry in chain)
    missing = next(
        (e for e in chain if isinstance(e, omegaconf.errors.MissingMandatoryValue)), None
    )
    if missing is not None:
        key = str(getattr(missing, "full_key", "")) or _quoted(str(missing))
        return InputError(f"{_rooted(key, text)}: has no value yet; give one as field=value")
    inside = re.search(r"In '(\w+)/(\w+)'.*\n.*Key '.*' not in .*\n\s*full_key: (\S+)", text)
    if inside is not None:
        group, option, key = inside.groups()
        section = key.partition(".")[0]
        chosen = [a for a in arguments if a.partition("=")[0] == section] or [section]
        return InputError(f"{group}={option}: sets {key}, which {chosen[-1]} has not")
    for argument in arguments:
        key = argument.lstrip("+~").partition("=")[0]
        marks = f"'{argument}'", f"'{key}'", f"override {argument}", f"override ++{argument}"
        if any(mark in text for mark in marks):
            reason = _type_reason(text)
            if reason:
                return InputError(f"{argument}: {reason}")
            # A group may need a field that has no value of its own, such as model=external.
            fields = known_fields(config_name, [a for a in arguments if a != argument])
            group = key.partition(".")[0]
            top = list(GROUPS) if config_name in COMPOSED else [f for f in fields if "." not in f]
            siblings = [f for f in fields if f.startswith(f"{group}.")] or top
            hint = nearest(key, fields)
            return InputError(f"{key}: unknown field; {hint}allowed: {', '.join(siblings)}")
    return InputError(str(chain[0]))


def _quoted(text: str) -> str:
    found = re.search(r"['\"]?([A-Za-z_.]+)['\"]?", text)
    return found[1] if found else text


def _rooted(key: str, text: str) -> str:
    full = re.search(r"full_key: (\S+)", text)
    return full[1] if full and "." in full[1] else key


def _type_reason(text: str) -> str | None:
    """OmegaConf's complaint about a type, in our words."""
    kinds = {
        "Integer": "an integer",
        "Float": "a number",
        "Bool": "true or false",
        "String": "text",
    }
    found = re.search(r"could not be converted to (\w+)", text)
    if found:
        return f"must be {kinds.get(found[1], found[1])}"
    if "reference_type=Dict" in text and "Cannot merge" in text:
        return "must be {name: value}"
    if re.search(r"Key .* is incompatible with \(str\)", text):
        return "must be {name: value}, each name text"
    if "to string: " in text:
        return "must be text"
    if "is not a ListConfig" in text or "Cannot merge DictConfig with ListConfig" in text:
        return "must be a list, such as [a,b]"
    if "field is not Optional" in text or "is not Optional" in text:
        return "must have a value, null is not one"
    if (
        "Cannot assign" in text
        or "is not a subclass" in text
        or "incompatible type" in text.lower()
    ):
        return "has the wrong type"
    return None


def known_fields(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Every field and group that a command knows, with these arguments."""
    composed = config_name in COMPOSED
    fields = list(GROUPS) if composed else []

    def walk(prefix: str, value: object) -> None:
        fields.append(prefix)
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)

    with contextlib.suppress(Exception):  # a hint is no reason for another error
        plain = (
            compose(config_name, arguments).plain()
            if composed
            else compose_plain(config_name, None)
        )
        for key, value in plain.items():
            if key not in ("choices", "kinds", "arguments"):
                walk(key, value)
    # Noted in config.yaml, and not to be typed.
    fields = [field for field in fields if field != "model.source"]
    return [*fields, "resume", "rerun"] if composed else fields
