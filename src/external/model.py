"""A model that is not ours: `model=external model.target=package.module:callable`.

The callable gives an `nn.Module` that maps token ids (B, T) to logits (B, T, V), on the CPU, in
float32, position t from tokens 0 .. t. It is called with `model.kwargs`, and with `vocab_size` and
`max_seq_len` where it has parameters of these names. What the module draws while it is built comes
from the run's seed, by the global generators of torch, NumPy and Python. What a forward pass
changes in the module by itself, as BatchNorm its running statistics, a skipped step does not put
back. What it must remember from step to step is a persistent buffer: a run that goes on from a
saved state has no other memory.

The module may have any of these methods, as ours have:

- `extra_losses()`: weighted terms of the last forward pass that join the loss, by metric name;
- `finish_batch()` after each micro-batch, `finish_step(applied=...)` after each optimizer step;
- `num_inactive_params()`: parameters that a single token does not pass through;

and any module inside it a method `router_stats()`, which gives its figures as floats by name, so
that the instruments read it as a router: `nonfinite.expose_router` gives one to a linear gate.
`src.external.interface_check` tries all of this before anything is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.checkpoint.part_kinds import ExternalPart
from src.common.errors import InputError
from src.common.override_grammar import Override
from src.common.read_checkpoint import EXTERNAL
from src.external.interface_check import (
    check_contract,
    logits_of,
    num_inactive_params,
    unsaved_state,
)
from src.external.load_target import TARGET, call, load_callable, seeded, source_hash
from src.model.architecture import Architecture, GeneratorFor
from src.model.size import BYTES_FLOAT32, Size

ROWS = 2
"""Of the batch on which a model is tried."""

CAUSAL_TOLERANCE = 1e-3
"""Relative to the largest logit: products of another shape round otherwise, leaks are larger."""


@dataclass(kw_only=True)
class ExternalConfig:
    """Where a model that is not ours comes from."""

    target: str
    """package.module:callable, found as Python finds modules where the command runs."""
    kwargs: dict[str, Any]
    """Keyword arguments of the callable."""

    def __post_init__(self) -> None:
        if not TARGET.fullmatch(self.target):
            raise ValueError(f"target={self.target}: must be package.module:callable")


def parts_for(typed: Sequence[Override]) -> list[str]:
    """Overrides that choose the parts of a model that is not ours, whatever a preset says.

    Raises:
        InputError: others were typed.
    """
    last = {override.key: override.text for override in typed}
    if last.get("model") != EXTERNAL:
        return []
    for group in ("attention", "ffn"):
        if last.get(group, EXTERNAL) != EXTERNAL:
            raise InputError(
                f"{group}={last[group]}: model={EXTERNAL} brings its own; leave it out"
            )
    return [f"{group}={EXTERNAL}" for group in ("attention", "ffn") if group not in last]


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raises InputError where one part of a model is ours and another is not."""
    if isinstance(parts["model"], ExternalConfig):
        return
    for group in ("attention", "ffn"):
        if isinstance(parts[group], ExternalPart):
            raise InputError(f"{group}={EXTERNAL}: goes with model={EXTERNAL} alone")


@dataclass(frozen=True, kw_only=True)
class ExternalModel(Architecture):
    """A model that is not ours, as the rest of the project sees it."""

    config: ExternalConfig
    seq_len: int

    @property
    def vocab_size(self) -> int | None:
        """See Architecture."""
        return None

    def check(self) -> None:
        """See Architecture."""
        load_callable(self.config.target, field="model.target")

    @property
    def _what(self) -> str:
        """Begins the lines of errors."""
        return f"model.target={self.config.target}"

    def facts(self) -> dict[str, Any]:
        """The hash of the file that it is built by, whose change is another model."""
        return {"source": source_hash(self.config.target, field="model.target")}

    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """See Architecture.

        Raises:
            InputError: the callable raises, or what it gives is no language model of so many
                tokens.
        """
        with seeded(generator_for(EXTERNAL).initial_seed()):
            model = call(
                self.config.target,
                dict(self.config.kwargs),
                field="model.target",
                vocab_size=vocab_size,
                max_seq_len=self.seq_len,
            )
        tokens_BT = torch.zeros(ROWS, self.seq_len, dtype=torch.long)
        num_known = logits_of(model, tokens_BT, what=self._what).shape[-1]
        if num_known < vocab_size:
            raise InputError(
                f"{self._what}: gives logits of {num_known} tokens, must be at least the"
                f" tokenizer's {vocab_size}"
            )
        check_contract(model, tokens_BT, what=self._what)
        return model

    def notes(self, model: nn.Module) -> list[str]:
        """See Architecture."""
        tokens_BT = torch.zeros(ROWS, self.seq_len, dtype=torch.long)
        notes = [
            f"{self._what}: {name} changes in training and is no persistent buffer: it begins anew"
            " in a run that is resumed, forked, or shares its first steps"
            for name in unsaved_state(model, tokens_BT)
        ]
        before = logits_of(model, tokens_BT, what=self._what)
        tokens_BT[:, -1] = 1
        after = logits_of(model, tokens_BT, what=self._what)
        moved = (after - before)[:, :-1].abs().max().item() if self.seq_len > 1 else 0.0
        # Logits that are not finite say nothing about it.
        if moved > CAUSAL_TOLERANCE * before.abs().max().item():
            notes.append(
                f"{self._what}: a token changes the logits before it, by up to"
                f" {moved:.2g}: the loss is none of prediction"
            )
        return notes

    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """See Architecture; builds the model and runs it once, for what nobody has declared."""
        model = self.build(
            vocab_size=vocab_size, generator_for=lambda _: torch.Generator().manual_seed(0)
        )
        tokens_BT = torch.zeros(ROWS, self.seq_len, dtype=torch.long)
        # Fused kernels of attention count nothing on the CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits_BTV = logits_of(model, tokens_BT, what=self._what)
        forward = counter.get_total_flops() // tokens_BT.numel()
        total = sum(parameter.numel() for parameter in model.parameters())
        by_part: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            part = name.rpartition(".")[0].partition(".")[0] or name
            by_part[part] = by_part.get(part, 0) + parameter.numel()
        return Size(
            params_total=total,
            params_active=total - num_inactive_params(model, what=self._what),
            params_by_part=by_part,
            vocab_size=logits_BTV.shape[-1],
            cache_bytes_per_token=None,
            decoding="unknown: an external model",
            flops_per_token=3 * forward,
            forward_flops_per_token=forward,
            checkpoint_bytes=total * BYTES_FLOAT32 * (3 + averaged_weights),
        )
