"""Files from the Hugging Face hub, or from its cache on this machine."""

import socket
import urllib.parse
from pathlib import Path

from src.errors import InputError


def fetch_file(repository: str, name: str, *, field: str, otherwise: str) -> Path:
    """One file, from the cache where it is there already.

    Args:
        repository: a model's id, such as HuggingFaceTB/SmolLM2-135M.
        name: of the file.
        field: what the user typed, named in errors.
        otherwise: what to do without a network, for errors.

    Raises:
        InputError: there is no such file, or no network.
    """
    import huggingface_hub

    try:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
        _require_network()
        return Path(huggingface_hub.hf_hub_download(repository, name))
    except (OSError, ValueError) as error:  # the library's errors are among these
        raise _unreadable(field, error, otherwise) from error


def fetch_model(repository: str, *, field: str, otherwise: str) -> Path:
    """The folder with a model's config.json, tokenizer.json and safetensors; arguments as above."""
    import huggingface_hub

    wanted = ["config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json"]
    try:
        _require_network()
        folder = huggingface_hub.snapshot_download(repository, allow_patterns=wanted)
    except (OSError, ValueError) as error:
        try:
            folder = huggingface_hub.snapshot_download(repository, local_files_only=True)
        except (OSError, ValueError):
            raise _unreadable(field, error, otherwise) from error
    return Path(folder)


def _require_network() -> None:
    """Asked first, because the library's own retries without a network last half a minute."""
    import huggingface_hub

    host = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).hostname or ""
    socket.create_connection((host, 443), timeout=5).close()


def _unreadable(field: str, error: Exception, otherwise: str) -> InputError:
    return InputError(
        f"{field}: no such folder, and the hub could not be read ({type(error).__name__});"
        f" offline, {otherwise}"
    )
