"""Turns exceptions of Hydra and OmegaConf into one line that says what to type instead."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import hydra.errors
import omegaconf.errors

from src.cli.hints import for_brackets, for_word
from src.cli.name_checks import GRAMMAR_HINT, not_on, unknown_field, unknown_option
from src.cli.value_checks import KINDS, missing_value, what_to_type
from src.common.errors import InputError
from src.common.override_grammar import GROUPS, parse
from src.common.tracking_address import masked
from src.config.field_names import COMPOSED, fields_of, names_in
from src.config.hydra_compose import is_own_option

MAIN_FIELDS = {
    "audit": "target",
    "convert": "source",
    "diagnose": "checkpoint",
    "generate": "run",
    "replay": "incident",
    "report": "study",
}
"""What a value without a field is meant for, by command."""

UNKNOWN_KEY = (omegaconf.errors.ConfigKeyError, omegaconf.errors.ConfigAttributeError)


@contextlib.contextmanager
def readable(config_name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise inside this context into an InputError of one line."""
    try:
        yield
    except hydra.errors.MissingConfigException as error:
        # Masked as a whole, because half an address with a password could not be recognised.
        group, _, option = masked(str(error.missing_cfg_file)).rpartition("/")
        raise unknown_option(group, option) from error
    except hydra.errors.OverrideParseException as error:
        raise _unreadable(config_name, str(error.override), arguments) from error
    except (hydra.errors.HydraException, omegaconf.errors.OmegaConfBaseException) as error:
        raise _bad_field(config_name, error, arguments) from error
    except ValueError as error:
        if "integer string conversion" in str(error):
            # int() refuses texts of more than 4300 digits.
            raise InputError("an argument holds an integer of more than 64 bits") from error
        if str(error).startswith("Config group override"):
            typed = [a for a in arguments if a.partition("=")[0] in GROUPS]
            raise InputError(
                f"{' '.join(typed)}: must be the name of an option; stability also takes a list"
            ) from error
        raise
    except AssertionError as error:
        # OmegaConf asserts if a field is set below a section that is null, such as a remedy's.
        for override in parse(arguments):
            section, _, field = override.key.partition(".")
            remedy = field.partition(".")[0]
            if section == "stability" and remedy:
                raise not_on(override.key, override.text, remedy) from error
        raise


def _bad_field(config_name: str, error: Exception, arguments: Sequence[str]) -> InputError:
    """The line for an unknown field, a value of the wrong type, or a missing value."""
    cause = _omegaconf_error(error)
    if isinstance(cause, omegaconf.errors.MissingMandatoryValue):
        return missing_value(str(cause.full_key))
    # Only Hydra's text names the file in conf/ that could not be merged.
    in_file = re.search(r"In '(\w+)/(\w+)'", str(error))
    if in_file is not None and isinstance(cause, UNKNOWN_KEY):
        group, option = in_file.groups()
        if is_own_option(group, option):
            return _in_own_file(group, option, str(cause.full_key))
        section = str(cause.full_key).partition(".")[0]
        chosen = [a for a in arguments if a.partition("=")[0] == section] or [section]
        return InputError(f"{group}={option}: sets {cause.full_key}, which {chosen[-1]} lacks")
    # An element of a list has the name of the list and its index.
    path = "" if cause is None else str(cause.full_key).partition("[")[0]
    argument = _argument_about(path, str(error), arguments)
    if argument is None:
        return InputError(str(error))
    if cause is not None and not isinstance(cause, UNKNOWN_KEY):
        reason = _type_reason(cause)
        return InputError(f"{argument}: {reason}{what_to_type(reason, *_split(argument))}")
    key, value = _split(argument)
    names = known_fields(config_name, [a for a in arguments if a != argument])
    return unknown_field(config_name, path if path.startswith(f"{key}.") else key, value, names)


def _in_own_file(group: str, option: str, field: str) -> InputError:
    """The line for a file of the user's own that sets a field which does not exist."""
    section, _, name = field.partition(".")
    start = f"{group}={option}: sets {field}, which does not exist;"
    if group == "preset" and section == "preset":
        # Without this line a file sets fields of its own group, and a preset has none.
        return InputError(f"{start} begin the file with # @package _global_")
    if section == "stability" and "." not in name:
        return InputError(
            f"{start} a file sets fields of a remedy below its name, such as clip03: {{norm: 0.1}};"
            f" for a remedy of your own, add {name} to REMEDIES in src/stability/__init__.py"
        )
    return InputError(f"{start} --info and docs/configuration.md list those that do")


def _unreadable(config_name: str, argument: str, arguments: Sequence[str]) -> InputError:
    """The line for an argument that Hydra's grammar does not accept."""
    hint = for_brackets(argument.partition("=")[2])
    if "=" not in argument.strip("="):
        after = arguments[arguments.index(argument) + 1 :] if argument in arguments else []
        following = after[0] if after else None
        hint = for_word(argument, following, known_fields(config_name, []))
        if hint is None and config_name in MAIN_FIELDS:
            hint = f"type {MAIN_FIELDS[config_name]}={argument}"
    return InputError(f"{argument}: cannot be read; {hint or GRAMMAR_HINT}")


def _omegaconf_error(error: BaseException) -> Any:
    """The first error of OmegaConf's in a chain of causes that names a field; None if none does."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, omegaconf.errors.OmegaConfBaseException) and link.full_key:
            return link
        link = link.__cause__ or link.__context__
    return None


def _argument_about(path: str, text: str, arguments: Sequence[str]) -> str | None:
    """The argument that sets a field, the section above it or a field below it.

    Args:
        path: the field; empty if Hydra raised the error, which names the field in its text only.
        text: Hydra's message.
        arguments: as typed.
    """

    def is_about(argument: str) -> bool:
        key = _key(argument)
        if not path:
            return f"'{key}'" in text
        return key == path or path.startswith(f"{key}.") or key.startswith(f"{path}.")

    found = [argument for argument in arguments if is_about(argument)]
    # If several arguments set the field, Hydra's text repeats the one that failed.
    return next((argument for argument in found if argument in text), found[-1] if found else None)


def _key(argument: str) -> str:
    return _split(argument)[0]


def _split(argument: str) -> tuple[str, str]:
    """The field and the value of an argument."""
    key, _, value = argument.lstrip("+~").partition("=")
    return key, value


def _type_reason(error: Any) -> str:
    """What the value should have been, from the fields of OmegaConf's exception."""
    if isinstance(error, omegaconf.errors.KeyValidationError):
        return "must be {name: value}, each name text"
    if isinstance(error, omegaconf.errors.ConfigTypeError):
        # A list was given for a mapping or the reverse; ref_type is the type of the field itself.
        needed = error.ref_type
    elif isinstance(error.key, int):
        (needed,) = get_args(error.ref_type)
    elif dataclasses.is_dataclass(error.object_type):
        needed = get_type_hints(error.object_type).get(error.key)
    else:
        needed = None
    choices = [kind for kind in get_args(needed) if kind is not type(None)]
    if type(None) in get_args(needed) and len(choices) == 1:
        needed = choices[0]
    elif error.value is None and isinstance(error, omegaconf.errors.ValidationError):
        return "must have a value, not null"
    return KINDS.get(get_origin(needed) or needed, "has the wrong type")


def known_fields(config_name: str, arguments: Sequence[str]) -> list[str]:
    """All fields and groups that can be typed for a command, given its other arguments.

    The other arguments count, because a group may need one of them to be composed at all, such as
    model=external, whose target has no default.
    """
    with contextlib.suppress(Exception):  # The list is a hint; it must not raise another error.
        brought: list[str] = []
        if config_name in COMPOSED and any(a.startswith("init=") for a in arguments):
            # Imported here, because only this reads a saved model, which needs PyTorch.
            from src.config.compose import initial

            brought = initial(config_name, arguments, parse(arguments))[1]
        return names_in(config_name, fields_of(config_name, [*brought, *arguments]))
    return list(GROUPS) if config_name in COMPOSED else []
