"""A library that this Python lacks: one line that says how to get it, instead of a traceback.

This module imports the standard library alone.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing_library(error: ModuleNotFoundError) -> str | None:
    """What to do about a library that cannot be found; None if another thing is missing."""
    name = (error.name or "").partition(".")[0]
    # If a module of this project is missing, the fault is ours, and its traceback is needed.
    if not name or name == "src" or importlib.util.find_spec(name) is not None:
        return None
    venv = ROOT / ".venv"
    activate = venv / "bin" / "activate"
    is_here = Path.cwd() == ROOT
    place = os.path.relpath(activate) if is_here else str(activate)
    if Path(sys.prefix).resolve() == venv.resolve():
        what = "the installation in .venv is not complete; type make setup"
    elif activate.is_file():
        what = f"type source {place}"
    else:
        what = f"type make {'setup' if is_here else f'-C {ROOT} setup'}, then source {place}"
    return f"{name} is not installed for this Python ({sys.executable}); {what}"
