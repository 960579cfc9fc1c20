"""Estimates how long a run takes by timing a few steps of its model on this machine."""

import time

import torch

from src.common.random_streams import generator
from src.config.run_config import RunConfig
from src.model import Transformer
from src.training.loss import losses

STEPS = 2
"""Number of timed steps."""
START_SECONDS = 8.0
"""Seconds that a process takes before its first step and after its last, together."""
COMPILE_SECONDS = 10.0
"""Seconds that torch.compile takes before the first step: 7 to 11 on one core if the same model has
been compiled on the machine before, as by an earlier run of the sweep; 40 to 65 otherwise."""
TOO_MANY_FLOPS = 1e13
"""FLOPs of one step above which the timing would take too long."""


def step_seconds(config: RunConfig, *, vocab_size: int, flops_per_token: int) -> float | None:
    """Seconds of a step, forward and backward; None if the model cannot be tried here."""
    recipe = config.recipe
    flops = flops_per_token * recipe.tokens_per_step
    lacks_gpu = config.trainer.device_type == "cuda" and not torch.cuda.is_available()
    if flops > TOO_MANY_FLOPS or lacks_gpu:
        return None
    threads = torch.get_num_threads()
    torch.set_num_threads(config.trainer.threads)
    try:
        return _measure(config, vocab_size) * recipe.accumulate
    finally:
        torch.set_num_threads(threads)


def _measure(config: RunConfig, vocab_size: int) -> float:
    recipe, device = config.recipe, torch.device(config.trainer.device_type)
    model = config.architecture.build(
        vocab_size=vocab_size, generator_for=lambda name: generator(0, "init", name)
    ).to(device)
    if recipe.precision == "bf16-true":
        model = model.to(torch.bfloat16)
    if isinstance(model, Transformer):
        model.checkpoint_blocks = config.trainer.activation_checkpointing
    shape = recipe.batch_size, recipe.seq_len
    tokens_BT = torch.randint(vocab_size, shape, generator=generator(0, "cost")).to(device)
    autocast = recipe.precision == "bf16-mixed"
    begin = 0.0
    for step in range(1 + STEPS):
        # The first step is not timed: it allocates memory and chooses kernels.
        if step == 1:
            begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = losses(model, tokens_BT, tokens_BT, z_loss_weight=0.0)["loss"]
        loss.backward()
        model.zero_grad()
        # Reading the value waits until the GPU has finished.
        float(loss.detach())
    return (time.perf_counter() - begin) / STEPS
