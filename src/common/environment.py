"""Facts about the code and the machine, as record.json states them."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "lightning", "hydra-core", "omegaconf", "mlflow", "torch-ema", "numpy")


def git_facts() -> dict[str, str | bool | None]:
    """`git_sha` and `git_dirty` of this checkout; both None where the code is not in one."""
    here = Path(__file__).parent

    def git(*args: str) -> str | None:
        command = ("git", "-C", str(here), *args)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    sha = git("rev-parse", "HEAD")
    status = git("status", "--porcelain", "--untracked-files=no")
    return {"git_sha": sha, "git_dirty": None if status is None else bool(status)}


@functools.cache
def code_digest() -> str:
    """A hash of every source file of this package, committed or not.

    It is computed once. A process calls it when it has imported what it runs, because the files may
    change afterwards.
    """
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the numbers."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


def device_facts(device: "torch.device") -> dict[str, str | int | None]:
    """What the run ran on."""
    import torch

    cuda = device.type == "cuda"
    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }
