"""How long a run will take, from a few steps of its model on this machine."""

import time

import torch

from src.common.random_streams import generator
from src.config.run_config import RunConfig
from src.model import Transformer
from src.training.loss import losses

STEPS = 2
START_SECONDS = 8.0
"""What a process takes before its first step, and after its last."""
COMPILE_SECONDS = 30.0
"""What torch.compile takes before the first step of a compiled run: 20 to 40 on one core."""
TOO_MANY_FLOPS = 1e13
"""Of one step; above, the few steps would take longer than their answer is worth."""


def step_seconds(config: RunConfig, *, vocab_size: int, flops_per_token: int) -> float | None:
    """Seconds of one step, forward and backward; None for a model too large to try here."""
    recipe = config.recipe
    flops = flops_per_token * recipe.tokens_per_step
    elsewhere = config.trainer.device_type == "cuda" and not torch.cuda.is_available()
    if flops > TOO_MANY_FLOPS or elsewhere:
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
    if isinstance(model, Transformer):
        model.checkpoint_blocks = config.trainer.activation_checkpointing
    shape = recipe.batch_size, recipe.seq_len
    tokens_BT = torch.randint(vocab_size, shape, generator=generator(0, "cost")).to(device)
    autocast = recipe.precision == "bf16-mixed"
    begin = 0.0
    for step in range(1 + STEPS):
        if step == 1:
            begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = losses(model, tokens_BT, tokens_BT, z_loss_weight=0.0)["loss"]
        loss.backward()
        model.zero_grad()
        # Waits for a GPU to be done.
        float(loss.detach())
    return (time.perf_counter() - begin) / STEPS
