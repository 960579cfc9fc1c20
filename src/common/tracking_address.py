"""The address of a tracking server or database, and the secrets in it.

A user, password or token in an address stays where the user gave it: files, messages and command
lines hold the address without them. This process and its children find the full address in one
environment variable.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from src.common.errors import InputError

VARIABLE = "MLFLOW_TRACKING_URI"
"""The environment variable that holds the address with its secrets."""

FIELD = "tracking.uri"

SERVED = "/compare"
"""The path at which our pages answer with the `fingerprint` of the database that they show."""

SQLITE = "sqlite:///"
_SERVERS = ("http", "https")
_DATABASES = ("postgresql", "mysql", "mssql")
ADDRESSES = (
    "http://host:port, https://..., sqlite:///file.db, postgresql://..., mysql://..., mssql://..."
)

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


def default_uri() -> str:
    """MLFLOW_TRACKING_URI without its secrets, else a database in the working directory.

    Raises:
        InputError: the variable holds no address.
    """
    given = os.environ.get(VARIABLE)
    return _taken(given, field=VARIABLE) if given else f"{SQLITE}mlflow.db"


def given_uri(given: Mapping[str, Any]) -> str | None:
    """The field tracking.uri of a command, without its secrets; None where it is null.

    Raises:
        InputError: it is no address.
    """
    tracking = given["tracking"]
    if not isinstance(tracking, Mapping):
        raise InputError(f"tracking={tracking}: has the wrong type; tracking.uri is an address")
    uri = tracking.get("uri")
    return None if uri is None else _taken(str(uri), field=FIELD)


def _taken(uri: str, *, field: str) -> str:
    """An address without its secrets, its form checked."""
    clean = take(uri, field=field)
    check_address(clean, field=field)
    return clean


def check_address(uri: str, *, field: str) -> None:
    """Looks at the form of an address, and asks nobody.

    Args:
        uri: of a server or a database, without secrets.
        field: what it was given for, named in errors.

    Raises:
        InputError: MLflow can write to nothing of this form, or there is no folder for its file.
    """
    shown = f"{field}={uri}"
    if uri == "databricks" or uri.startswith("databricks://"):
        return
    try:
        parts = urlsplit(uri)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{shown}: is no address (allowed: {ADDRESSES})") from error
    kind = parts.scheme.partition("+")[0]
    if kind in _DATABASES or parts.scheme in _SERVERS:
        if not host or port == 0 or re.search(r"\s", uri):
            raise InputError(f"{shown}: names no host (allowed: {ADDRESSES})")
        return
    if not uri.startswith(SQLITE):
        raise InputError(f"{shown}: must be one of {ADDRESSES}")
    if "?" in uri:
        # What follows would be taken for settings of the connection, or for a token.
        raise InputError(f"{field}={uri.partition('?')[0]}: the path of a database takes no ?")
    database = database_of(uri)
    if not database.parent.is_dir():
        raise InputError(f"{shown}: {database.parent}: no such folder; make it first")
    if uri == SQLITE or database.is_dir():
        raise InputError(f"{shown}: must name a file, such as {SQLITE}mlflow.db")


def database_of(uri: str) -> Path:
    """The file of a database, whose path may begin with ~."""
    return Path(uri.removeprefix(SQLITE)).expanduser().resolve()


def fingerprint(uri: str) -> str:
    """A text that tells databases apart without naming them."""
    clean = without_secrets(uri)
    place = str(database_of(clean)) if clean.startswith(SQLITE) else clean
    return hashlib.sha256(place.encode()).hexdigest()


def is_server(uri: str) -> bool:
    """Whether it is an address that several machines can write to, and not a file or a folder."""
    return urlsplit(uri).scheme.partition("+")[0] not in ("", "file", "sqlite")
