"""The address of a tracking server or database, and the secrets that people write into one.

A user, a password or a token in an address goes no further than the place where it is
given: files, messages and command lines hold the address alone. This process, and those that it
starts, know the whole address by one environment variable.
"""

import os
import re

from src.common.errors import InputError

VARIABLE = "MLFLOW_TRACKING_URI"
"""The environment variable that holds an address with its secrets."""

FIELD = "tracking.uri"

ADVICE = (
    "it asks for a user and password, or a token: type"
    f" {FIELD}=SCHEME://USER:PASSWORD@HOST, or set {VARIABLE} to that, or set"
    " MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
)


def without_secrets(uri: str) -> str:
    """An address without user, password and query.

    All of the query goes, because any name in it may be that of a token. Where a password holds a
    character that should have been escaped, too much goes rather than too little.
    """
    scheme, separator, rest = uri.partition("://")
    is_path = rest.startswith("/") and scheme.partition("+")[0] in ("sqlite", "file")
    if not separator or is_path:
        return uri
    place = rest.rpartition("@")[2]
    return f"{scheme}://{re.split('[?#]', place, maxsplit=1)[0]}"


def keep(uri: str) -> str:
    """Returns an address without its secrets, which this process and its children then know."""
    clean = without_secrets(uri)
    if clean != uri:
        os.environ[VARIABLE] = uri
    return clean


def take(uri: str, *, field: str = FIELD) -> str:
    """The same for an address that a user has given.

    Args:
        uri: as it was given.
        field: where.

    Raises:
        InputError: its secrets cannot be used as they are.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator and "@" in uri:
        # Not repeated, because it may be an address whose scheme is mistyped.
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
        # MLflow would take it for the name of a secret there, and say it in its messages.
        raise InputError(f"{field}={clean}: an address of Databricks takes no user and password")
    if scheme.lower() in ("http", "https") and "?" in rest:
        raise InputError(
            f"{field}={clean}: the address of a server must end before the ?; set"
            " MLFLOW_TRACKING_TOKEN to a token, or type http://USER:PASSWORD@HOST"
        )
    return keep(uri)


def with_secrets(address: str) -> str:
    """The address as this process was given it, by the command line or the environment."""
    given = os.environ.get(VARIABLE, "")
    return given if without_secrets(given) == address else address


def take_typed(argument: str) -> str:
    """An argument of the command line, without what is secret in it where it is an address.

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
    """A text for people or files, without the secrets of addresses in it."""
    given = os.environ.get(VARIABLE, "").rstrip("/")
    if given:
        text = text.replace(given, without_secrets(given))
    text = re.sub(r"(\w://)[^\s/'\"@]*@", r"\1", text)
    return re.sub(r"((?i:https?)://[^\s'\"?#]*)\?[^\s'\"]*", r"\1", text)


def wants_secret(reason: str) -> bool:
    """Whether the text of an error says that a user, password or token is missing or wrong."""
    pattern = r"\b(401|403)\b|password|authenticat|unauthori|access denied"
    return re.search(pattern, reason, re.IGNORECASE) is not None
