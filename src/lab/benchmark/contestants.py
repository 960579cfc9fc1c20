"""The timed steps: this project's, the same model in transformers, and a lower bound."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from src.common.random_streams import generator
from src.config.run_config import RunConfig
from src.lab.benchmark.contender import after_step, generate, loss_of
from src.lab.benchmark.floor import Floor
from src.lab.benchmark.shapes import Case
from src.model.architecture import ModelParts
from src.model.transformer import Transformer
from src.run.process_setup import set_up_memory
from src.training.loss import compiled_losses
from src.training.task import build_optimizer

OURS, TRANSFORMERS, FLOOR = "ours", "transformers", "floor"
COMPILED = " compiled"
CONTESTANTS = (OURS, OURS + COMPILED, TRANSFORMERS, TRANSFORMERS + COMPILED, FLOOR)

NUM_BATCHES = 8
"""Number of different batches, used in turn."""

NUM_PROMPT_TOKENS = 16
LONGEST = 512
"""Smallest context of a model in tokens, so that decoding fits."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Decode = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A training step to time."""

    step: Callable[[], Tensor | None]
    """Runs one step; returns its loss, or None if there is none."""
    num_params: int
    decode: Callable[[int], None] | None = None
    """Continues a prompt greedily by the given number of tokens."""


def is_there(name: str) -> bool:
    """Whether the packages that a contestant needs are installed."""
    return not name.startswith(TRANSFORMERS) or importlib.util.find_spec("transformers") is not None


def build(name: str, case: Case, *, num_params: int) -> Contestant:
    """A contestant, ready to train.

    Args:
        name: one of CONTESTANTS.
        case: sizes, batch and device.
        num_params: parameters that the floor's AdamW updates.
    """
    config = case.config()
    assert isinstance(config.architecture, ModelParts)
    if name == FLOOR:
        floor = Floor(
            config.architecture,
            batch_size=case.batch_size,
            vocab_size=case.sizes.vocab_size,
            num_params=num_params,
            dtype=case.dtype,
            device=torch.device(case.device),
        )
        return Contestant(step=floor.step, num_params=num_params)
    # The context must hold the decoded tokens too.
    parts = replace(config.architecture, seq_len=max(config.architecture.seq_len, LONGEST))
    who = _ours if name.removesuffix(COMPILED) == OURS else _of_transformers
    model, loss, decode = who(parts, case.sizes.vocab_size)
    if name == OURS + COMPILED:
        loss = _compiled_loss(model)
    elif name.endswith(COMPILED):
        loss = torch.compile(loss, dynamic=False)
    return _contestant(model, loss, decode, config, case)


def _ours(parts: ModelParts, vocab_size: int) -> tuple[nn.Module, Loss, Decode]:
    # As in a run of this project; other contestants keep their own defaults.
    set_up_memory()
    model = parts.build(
        vocab_size=vocab_size, generator_for=lambda name: generator(0, "init", name)
    )
    assert isinstance(model, Transformer)
    return model, loss_of, lambda prompt_1T, count: generate(model, prompt_1T, count)


def _compiled_loss(model: nn.Module) -> Loss:
    """As in a run with compile=true."""
    losses = compiled_losses(model)

    def loss(model: nn.Module, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return losses(model, inputs_BT, targets_BT, z_loss_weight=0.0)["loss"]

    return loss


def _of_transformers(parts: ModelParts, vocab_size: int) -> tuple[nn.Module, Loss, Decode]:
    from src.lab.benchmark.transformers_models import (
        transformers_decode,
        transformers_loss,
        transformers_model,
    )

    model = transformers_model(parts, vocab_size=vocab_size)
    return model, transformers_loss, transformers_decode(model)


def _contestant(
    model: nn.Module, loss: Loss, decode: Decode, config: RunConfig, case: Case
) -> Contestant:
    device = torch.device(case.device)
    model.to(device).train()
    optimizer = build_optimizer(model.parameters(), config.recipe)
    shape = case.batch_size, case.sizes.seq_len + 1
    draws = generator(0, "benchmark")
    batches = [
        torch.randint(case.sizes.vocab_size, shape, generator=draws).to(device)
        for _ in range(NUM_BATCHES)
    ]
    autocast = case.dtype == torch.bfloat16
    number = 0

    def step() -> Tensor:
        nonlocal number
        batch = batches[number % NUM_BATCHES]
        number += 1
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            value = loss(model, batch[:, :-1], batch[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, Transformer):
            after_step(model)
        return value.detach()

    def continue_prompt(count: int) -> None:
        decode(batches[0][:1, :NUM_PROMPT_TOKENS], count)

    num_params = sum(p.numel() for p in model.parameters())
    return Contestant(step=step, num_params=num_params, decode=continue_prompt)
