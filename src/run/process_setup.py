"""Settings of the whole process on which numbers or speed depend."""

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
"""Of oneDNN's products in bfloat16. Experts get another number of tokens in each step, and each
number is a product of its own: at its default of 1024 they take half a gigabyte. With 128 those of
thirty layers make each other anew, and a step takes a quarter longer."""


def set_up_memory() -> None:
    """Lets a process reuse what a training step has freed in the next one, and bounds its kernels.

    By default glibc returns large blocks to the system at once, and each step then waits for the
    same pages to be handed out and zeroed again. Changes no number. Other C libraries, which do not
    have the setting, are left as they are; so is a bound that the environment names.
    """
    # Read at the first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KERNELS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _MOST)
        mallopt(_M_MMAP_THRESHOLD, _MOST)


def set_numerics(config: RunConfig, *, rank: int = 0) -> None:
    """Sets what the last bits of numbers depend on, and quietens Lightning."""
    set_up_memory()
    torch.set_num_threads(config.trainer.threads)
    seed_global(stream_seed(config.seed, "global", *([rank] if rank else [])))
    torch.set_float32_matmul_precision(config.recipe.matmul_precision)
    # Its greetings, and its advice about workers, which a corpus in memory does not need.
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
