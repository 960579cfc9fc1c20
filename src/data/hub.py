"""Files from the Hugging Face hub, or from its local cache."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from src.common.errors import InputError


def fetch_file(repository: str, name: str, *, field: str, otherwise: str) -> Path:
    """One file from the hub; without a network, from the local cache.

    Args:
        repository: model id, such as HuggingFaceTB/SmolLM2-135M.
        name: file name.
        field: field and value that the user typed, named in errors.
        otherwise: what the user can do without a network, for errors.

    Raises:
        InputError: there is no such file, or there is no network and the file is not cached.
    """
    import huggingface_hub

    commit = _commit(repository, field=field)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                repository, name, revision=commit, local_files_only=commit is None
            )
        )
    except (OSError, ValueError) as error:  # the library's errors are among these
        raise _unread(field, error, online=commit is not None, otherwise=otherwise) from error


def fetch_model(repository: str, wanted: Sequence[str], *, field: str, otherwise: str) -> Path:
    """The folder of a model's files that match one of the patterns `wanted`; as `fetch_file`."""
    import huggingface_hub

    commit = _commit(repository, field=field)
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            allow_patterns=list(wanted),
            revision=commit,
            local_files_only=commit is None,
        )
    except (OSError, ValueError) as error:
        raise _unread(field, error, online=commit is not None, otherwise=otherwise) from error
    if commit is None and not (Path(folder) / "config.json").is_file():
        # The cache holds other files of this model, which another command fetched.
        raise _offline(field, otherwise)
    return Path(folder)


def _commit(repository: str, *, field: str) -> str | None:
    """The latest commit of a repository; None without a network.

    Looked up first because, if the hub refuses a request, the library silently uses an older copy.
    """
    import huggingface_hub

    if not _has_network():
        return None
    try:
        return huggingface_hub.HfApi().model_info(repository).sha
    except (OSError, ValueError) as error:
        raise _refused(field, error) from error


def _unread(field: str, error: Exception, *, online: bool, otherwise: str) -> InputError:
    return _refused(field, error) if online else _offline(field, otherwise)


def _has_network() -> bool:
    """Whether the hub can be reached; without this check the library retries for half a minute."""
    import huggingface_hub

    if urllib.request.getproxies().get("https"):
        return True
    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def _offline(field: str, otherwise: str) -> InputError:
    return InputError(
        f"{field}: no such folder, and the Hugging Face hub cannot be reached; offline, {otherwise}"
    )


def _refused(field: str, error: Exception) -> InputError:
    first = str(error).strip().partition("\n")[0]
    return InputError(f"{field}: no such folder, and the Hugging Face hub refused it ({first})")
