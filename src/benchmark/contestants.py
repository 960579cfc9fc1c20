"""Who is timed: this project's step, the same from transformers, and the floor below both."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from src.benchmark.contender import after_step, loss_of
from src.benchmark.floor import Floor
from src.benchmark.shapes import Case
from src.config import RunConfig
from src.model.architecture import ModelParts
from src.model.transformer import Transformer
from src.streams import generator
from src.training.optim import build_optimizer

OURS, TRANSFORMERS, FLOOR = "ours", "transformers", "floor"
COMPILED = " compiled"
CONTESTANTS = (OURS, OURS + COMPILED, TRANSFORMERS, TRANSFORMERS + COMPILED, FLOOR)

NUM_BATCHES = 8
"""Different ones, in turn."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something whose training step is timed."""

    step: Callable[[], Tensor | None]
    """One step; returns its loss, where there is one."""
    num_params: int


def is_there(name: str) -> bool:
    """Whether what a contestant needs is installed."""
    return not name.startswith(TRANSFORMERS) or importlib.util.find_spec("transformers") is not None


def build(name: str, case: Case, *, num_params: int) -> Contestant:
    """A contestant, ready to train.

    Args:
        name: one of CONTESTANTS.
        case: what it trains.
        num_params: that the floor's AdamW moves.
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
    who = name.removesuffix(COMPILED)
    model, loss = _ours(config, case) if who == OURS else _of_transformers(config, case)
    return _contestant(model, loss, config, case, compiled=name.endswith(COMPILED))


def _ours(config: RunConfig, case: Case) -> tuple[nn.Module, Loss]:
    model = config.architecture.build(
        vocab_size=case.sizes.vocab_size, generator_for=lambda name: generator(0, "init", name)
    )
    return model, loss_of


def _of_transformers(config: RunConfig, case: Case) -> tuple[nn.Module, Loss]:
    from src.benchmark.peers import transformers_loss, transformers_model

    assert isinstance(config.architecture, ModelParts)
    model = transformers_model(config.architecture, vocab_size=case.sizes.vocab_size)
    return model, transformers_loss


def _contestant(
    model: nn.Module, loss: Loss, config: RunConfig, case: Case, *, compiled: bool
) -> Contestant:
    device = torch.device(case.device)
    model.to(device).train()
    run: Any = torch.compile(model) if compiled else model
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
            value = loss(run, batch[:, :-1], batch[:, 1:])
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(model, Transformer):
            after_step(model)
        return value.detach()

    return Contestant(step=step, num_params=sum(p.numel() for p in model.parameters()))
