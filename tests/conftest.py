import logging
import os
from pathlib import Path

import pytest
import torch

PACE = (
    "preset=smoke",
    "tracking=local",
    "recipe.seq_len=16",
    "recipe.batch_size=4",
    "recipe.max_steps=12",
    "recipe.num_validations=3",
    "recipe.val_windows=8",
    "recipe.log_every=4",
)
"""The recipe of a run of a second or less."""
TINY = (
    *PACE,
    "model.num_layers=1",
    "model.hidden_dim=24",
    "model.num_heads=3",
    "model.inner_dim=32",
    "ffn.inner_dim=16",
    "attention.rope_dim=4",
    "data.max_chars=20000",
)
"""A run of a second or less: the whole command on a small model."""


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """One token cache for all tests of a worker."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(tmp_path, monkeypatch, shared_cache):
    """Arguments of a tiny run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return [*TINY, f"paths.cache={shared_cache}"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """On the CPU, where numbers are the same again bit by bit, also where a GPU is.

    A hook, because fixtures of a module that train come before those of a test.
    """
    with pytest.MonkeyPatch.context() as patch:
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture(autouse=True)
def _same_numerics():
    """Runs set these for the process; tests begin alike."""
    torch.set_num_threads(1)
    yield
    torch.set_float32_matmul_precision("highest")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _no_address_stays():
    """A command keeps an address with a password in the environment, for what it starts."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    yield
    os.environ.pop("MLFLOW_TRACKING_URI", None)
