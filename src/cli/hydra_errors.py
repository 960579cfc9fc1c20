"""What Hydra and OmegaConf raise, as one line that says what to type instead."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence

import hydra.errors
import omegaconf.errors

from src.common.errors import InputError, nearest
from src.common.override_grammar import GROUPS, parse
from src.common.tracking_address import masked
from src.config.compose import compose
from src.config.field_roles import role_of
from src.config.hydra_compose import compose_plain
from src.config.schema import CONF, Schema
from src.stability import REMEDIES

COMPOSED = ("train", "describe")
"""Commands that compose a run; all others have fields of their own."""

NOT_OFFERED = {
    "trainer=fsdp": "weights in shards are not offered, because a step that failed is run again by"
    " each process for itself, with whole weights; "
}
"""Options that people ask for, and why there are none."""

GRAMMAR_HINT = "arguments have the form field=value; values with blanks or signs need quotes"


@contextlib.contextmanager
def readable(config_name: str, arguments: Sequence[str]) -> Iterator[None]:
    """Turns what Hydra and OmegaConf raise inside into an InputError of one line."""
    try:
        yield
    except hydra.errors.MissingConfigException as error:
        raise _unknown_option(error) from error
    except hydra.errors.OverrideParseException as error:
        raise InputError(f"{error.override}: cannot be read; {GRAMMAR_HINT}") from error
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
            walk(key, value)
    if composed:
        # Of a run, these are in no config.yaml.
        fields += [field.name for field in dataclasses.fields(Schema) if field.name not in fields]
    return [field for field in fields if role_of(field).typed]
