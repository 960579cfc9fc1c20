"""What all tests share.

Imports of torch and of all that imports it stand in functions: pytest reads this file in the
process that only hands tests out as well, and the workers wait for that one.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import hashlib
import importlib
import json
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import filelock
import pytest

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


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """All that is imported here stays: the collector of garbage need not look through it.

    With it, a tenth of a tiny run would be its work.
    """
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


def copier(value):
    """Makes copies of a value; from bytes where it can be, in a third of the time of deepcopy."""
    try:
        content = pickle.dumps(value)
    except pickle.PicklingError:
        return functools.partial(copy.deepcopy, value)
    return functools.partial(pickle.loads, content)


def of_all_workers(tmp_path_factory) -> Path:
    """A folder that the workers of a session share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _what_tests_have_watched_says_nothing_at_the_end():
    """Many of them let steps fail, and each would be counted in a line of its own."""
    from nonfinite import closing_line

    yield

    closing_line.forget()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """One token cache for all tests."""
    return of_all_workers(tmp_path_factory) / "cache"


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """An empty database of MLflow's, made once for all workers: creating one takes seconds.

    By two processes at the same time, as two runs would: without a lock both crash.
    """
    from src.tracking.client import Server

    folder = of_all_workers(tmp_path_factory) / "mlflow-template"

    def make() -> int:
        """In a child process: its id."""
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = int(Server(f"sqlite:///{folder}/mlflow.db").connection_error() is not None)
            os._exit(code)
        return child

    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            makers = [make() for _ in range(2)]
            assert [os.waitpid(maker, 0)[1] for maker in makers] == [0, 0]
    return folder / "mlflow.db"


def kept(store, key, make):
    """What `make` gives, from the store where it is; the oldest of many goes."""
    if key in store:
        store.move_to_end(key)
    else:
        store[key] = make()
        if len(store) > 200:
            store.popitem(last=False)
    return store[key]


@pytest.fixture(scope="session", autouse=True)
def _what_is_composed_twice_is_kept():
    """Composing is a third of a tiny run, and Hydra would read conf/ again each time."""
    import hydra
    import hydra._internal.config_loader_impl as loading
    import omegaconf.base
    from hydra._internal.config_repository import ConfigRepository

    # Without it types are not checked, and what is kept would depend on which came first.
    import src.config.schema  # noqa: F401

    read, compose = ConfigRepository.load_config, hydra.compose
    choose = loading.create_defaults_list
    merge = loading.ConfigLoaderImpl._compose_config_from_defaults_list
    files = {}
    chosen, merged, composed = OrderedDict(), OrderedDict(), OrderedDict()

    def places(repository):
        return tuple((source.provider, source.path) for source in repository.get_sources())

    def load_config(repository, config_path):
        key = places(repository), config_path
        if key not in files:
            files[key] = copier(read(repository, config_path))
        return files[key]()

    def choose_once(repo, config_name, overrides_list, **settings):
        """Only options of groups change the list of files; fields are set afterwards."""
        if any(override.is_sweep_override() for override in overrides_list):
            return choose(repo, config_name, overrides_list, **settings)
        groups, fields = [], []
        for override in overrides_list:
            is_field = isinstance(override.value(), dict) or (
                not repo.group_exists(override.key_or_group)
            )
            (fields if is_field else groups).append(override)
        lines = tuple(override.input_line for override in groups)
        key = places(repo), config_name, lines, *settings.items()
        found = kept(chosen, key, lambda: choose(repo, config_name, groups, **settings))
        return dataclasses.replace(found, config_overrides=fields)

    def merge_once(loader, defaults, repo):
        key = places(repo), repr(defaults)
        return copy.deepcopy(kept(merged, key, lambda: merge(loader, defaults, repo)))

    def compose_once(config_name, overrides, return_hydra_config):
        key = config_name, tuple(overrides), return_hydra_config
        return copy.deepcopy(
            kept(composed, key, lambda: compose(config_name, list(overrides), return_hydra_config))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", load_config)
        patch.setattr(loading, "create_defaults_list", choose_once)
        patch.setattr(loading.ConfigLoaderImpl, "_compose_config_from_defaults_list", merge_once)
        # Of a value with `${...}` in it; no one changes a tree.
        patch.setattr("omegaconf.base.parse", functools.cache(omegaconf.base.parse))
        # Hydra copies all schemas where it needs another list of sources.
        patch.setattr(ConfigRepository, "__deepcopy__", lambda self, _: copy.copy(self), False)
        patch.setattr(hydra, "compose", compose_once)
        yield


_DRAWS = {"now": False}
"""Whether the running test has the mark `drawn`."""


@pytest.fixture(scope="session", autouse=True)
def drawings():
    """Charts are blank but for tests with the mark `drawn`, and PNG files are small.

    Drawing is half of a report. Charts that are drawn twice are kept; a test that draws twice to
    compare clears what is kept.
    """
    import vl_convert

    to_svg, to_png, drawn = vl_convert.vegalite_to_svg, vl_convert.svg_to_png, {}
    bundle, here = vl_convert.javascript_bundle, os.getpid()

    def unless_forked(draw, otherwise):
        """The threads that draw have not come along into a forked process: it would hang."""
        return draw() if os.getpid() == here else otherwise

    def vegalite_to_svg(spec):
        blank = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>'
        if not _DRAWS["now"]:
            return blank
        key = hashlib.sha256(json.dumps(spec).encode()).hexdigest()
        if key not in drawn:
            drawn[key] = unless_forked(lambda: to_svg(spec), blank)
        return drawn[key]

    def svg_to_png(svg, scale):
        if not _DRAWS["now"]:
            return b""
        key = hashlib.sha256(svg.encode()).hexdigest()
        if key not in drawn:
            drawn[key] = unless_forked(lambda: to_png(svg, scale=scale / 8), b"")
        return drawn[key]

    def javascript_bundle(script):
        return unless_forked(lambda: bundle(script), "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "vegalite_to_svg", vegalite_to_svg)
        patch.setattr(vl_convert, "svg_to_png", svg_to_png)
        patch.setattr(vl_convert, "javascript_bundle", javascript_bundle)
        yield drawn


@pytest.fixture(scope="session", autouse=True)
def _jobs_are_forked_from_here():
    """A sweep of one job at a time would start a server for its runs, which imports for seconds.

    The workers of `n_jobs=2` are processes of their own, and so are commands that
    `tests.runs.start` starts: these have the server.
    """
    import multiprocessing
    import signal

    from src.sweep import job
    from tests.forked import use_standard_streams

    set_start_method, train = multiprocessing.set_start_method, job.train

    def as_forked(method, force=False):
        importlib.import_module("src.run.lifecycle")
        set_start_method("fork" if method == "forkserver" else method, force=force)

    def train_here(arguments, log):
        # As a server's child has them.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        use_standard_streams()
        train(arguments, log)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "set_start_method", as_forked)
        patch.setattr(job, "train", train_here)
        yield


@pytest.fixture(scope="session", autouse=True)
def _samples_are_short():
    """The texts that a run leaves would be a third of a tiny run's time."""
    from src.generation import samples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "NUM_TOKENS", 12)
        yield


@pytest.fixture
def tiny(tmp_path, monkeypatch, shared_cache):
    """Arguments of a tiny run, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return [*TINY, f"paths.cache={shared_cache}"]


@pytest.fixture(scope="session", autouse=True)
def _blocks_are_tried_once_and_in_a_child(tmp_path_factory):
    """A prediction of memory builds two blocks of a model: of the largest these are gigabytes.

    PyTorch keeps for good what it once had, and the worker would hold them to its end.
    """
    from src.config import memory_estimate
    from tests.runs import in_a_child

    tried, folder = memory_estimate._kept_bytes, of_all_workers(tmp_path_factory) / "blocks"
    folder.mkdir(exist_ok=True)

    def kept_bytes(config, *, layers, rows):
        recipe = config.recipe
        what = repr((config.architecture, recipe.precision, recipe.seq_len, layers, rows))
        note = folder / hashlib.sha256(what.encode()).hexdigest()
        with filelock.FileLock(note.with_suffix(".lock")):
            if not note.exists():
                note.write_text(str(in_a_child(tried, config, layers=layers, rows=rows)))
        return int(note.read_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_estimate, "_kept_bytes", kept_bytes)
        yield


@pytest.fixture(scope="module", autouse=True)
def _freed_memory_is_given_back():
    """A run keeps what it frees, for its next step; a worker would hold the most of any test."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """On the CPU, where numbers are the same again bit by bit, also where a GPU is.

    A hook, because fixtures of a module that train, or draw, come before those of a test.
    """
    import torch

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_DRAWS, "now", item.get_closest_marker("drawn") is not None)
        if item.get_closest_marker("gpu") is None:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return (yield)


@pytest.fixture(autouse=True)
def _same_numerics():
    """Runs set these for the process; tests begin alike."""
    import torch

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
