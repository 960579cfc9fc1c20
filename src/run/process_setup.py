"""Process-wide settings that affect numbers or speed."""

import ctypes
import logging
import os
import warnings

import torch

from src.common.random_streams import seed_global, stream_seed
from src.config.run_config import RunConfig

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**30

_KERNELS = 256
"""Number of bfloat16 matmul kernels that oneDNN caches. An expert gets a different number of tokens
in each step, and each number needs its own kernel. With oneDNN's default of 1024 the cache grows to
half a gigabyte. With 128 the kernels of thirty layers evict each other, and a step takes a quarter
longer."""


def set_up_memory() -> None:
    """Makes a step reuse the memory that the step before has freed, and limits oneDNN's cache.

    By default glibc returns large blocks to the system at once, so that each step waits for the
    same pages to be allocated and zeroed again. No number depends on this. C libraries without
    mallopt are left as they are, and so is a cache size that the environment sets.
    """
    # oneDNN reads this at its first matrix product, so it must be set before.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_MMAP_THRESHOLD, _MOST)


def set_numerics(config: RunConfig, *, rank: int = 0) -> None:
    """Sets threads, random seeds and matmul precision of this process, and silences Lightning."""
    set_up_memory()
    torch.set_num_threads(config.trainer.threads)
    seed_global(stream_seed(config.seed, "global", *([rank] if rank else [])))
    torch.set_float32_matmul_precision(config.recipe.matmul_precision)
    # Lightning prints greetings, and advises more data workers, which a corpus in memory does not
    # need.
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
