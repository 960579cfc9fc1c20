"""The address of a tracking server or database, and the secrets in it.

A user, password or token in an address stays where the user gave it: files, messages and command
lines hold the address without them. This process and its children find the full address in one
environment variable.
"""

import os
import re

from src.common.errors import InputError

VARIABLE = "MLFLOW_TRACKING_URI"
"""The environment variable that holds the address with its secrets."""

FIELD = "tracking.uri"

ADVICE = (
    "the server asks for a user and password, or a token: type"
    f" {FIELD}=SCHEME://USER:PASSWORD@HOST, or set {VARIABLE} to that address, or set"
    " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
)


def without_secrets(uri: str) -> str:
    """The address without user, password and query.

    The whole query is removed, because any parameter in it may be a token. If a password holds a
    character that should have been escaped, this removes too much rather than too little.
    """
    scheme, separator, rest = uri.partition("://")
    is_path = rest.startswith("/") and scheme.partition("+")[0] in ("sqlite", "file")
    if not separator or is_path:
        return uri
    place = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', place, maxsplit=1)[0]}"


def keep(uri: str) -> str:
    """Stores an address with secrets in the environment; returns it without them."""
    clean = without_secrets(uri)
    if clean != uri:
        os.environ[VARIABLE] = uri
    return clean


def take(uri: str, *, field: str = FIELD) -> str:
    """As `keep`, for an address that a user typed, which is checked first.

    Args:
        uri: the address as typed.
        field: the field that holds it, named in errors.

    Raises:
        InputError: the address is malformed, or its secrets cannot be used as they are.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator and "@" in uri:
        # The line must not repeat the value: it may be an address with a mistyped scheme.
        raise InputError(f"{field}: must be one address, SCHEME://HOST or sqlite:///FILE")
    clean = without_secrets(uri)
    if clean == uri:
        return uri
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise InputError(f"{field}={clean}: must be one address, SCHEME://HOST or sqlite:///FILE")
    secret, at, _ = rest.rpartition("@")
    if at and re.search(r"[/?#@\\\s]", secret):
        raise InputError(
            f"{field}={clean}: a user or password in an address must have / ? # @ \\ written as"
            " %2F %3F %23 %40 %5C"
        )
    if at and scheme.lower() == "databricks":
        # MLflow would read it as the name of a Databricks secret and print it in messages.
        raise InputError(f"{field}={clean}: a Databricks address takes no user and password")
    if scheme.lower() in ("http", "https") and "?" in rest:
        raise InputError(
            f"{field}={clean}: the address of a server must end before the ?; set"
            " MLFLOW_TRACKING_TOKEN to a token, or type http://USER:PASSWORD@HOST"
        )
    return keep(uri)


def with_secrets(address: str) -> str:
    """The address with its secrets, if the environment holds them; else unchanged."""
    given = os.environ.get(VARIABLE, "")
    return given if without_secrets(given) == address else address


def take_typed(argument: str) -> str:
    """A command-line argument, without its secrets if it is a tracking address.

    Raises:
        InputError: the address cannot be used as it is.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+~").strip() != FIELD:
        return argument
    value = value.strip()
    quote = value[:1] if value[:1] in ("'", '"') and value[-1:] == value[:1] else ""
    return f"{key}={quote}{take(value.removeprefix(quote).removesuffix(quote))}{quote}"


def masked(text: str) -> str:
    """The text with the secrets of all addresses in it removed."""
    given = os.environ.get(VARIABLE, "").rstrip("/")
    if given:
        text = text.replace(given, without_secrets(given))
    text = re.sub(r"(\w://)[^\s/'\"@]*@", r"\1", text)
    return re.sub(r"((?i:https?)://[^\s'\"?#]*)\?[^\s'\"]*", r"\1", text)


def wants_secret(reason: str) -> bool:
    """Whether an error message says that a user, password or token is missing or wrong."""
    pattern = r"\b(401|403)\b|password|authenticat|unauthori|access denied"
    return re.search(pattern, reason, re.IGNORECASE) is not None
