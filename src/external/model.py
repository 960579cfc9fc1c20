"""External models: `model=external model.target=package.module:callable`.

The callable returns an `nn.Module` on the CPU, in float32, that maps token ids (B, T) to logits
(B, T, V), or to an object with these as `logits`, such as a model of transformers does; the logits
at position t depend on tokens 0 .. t only. It is called with `model.kwargs`,
and with `vocab_size` and `max_seq_len` if it has parameters of these names. Random initialisation
follows the run's seed through the global generators of torch, NumPy and Python.

Two things about state: a skipped step takes back what the forward pass changed in buffers, such as
BatchNorm's running statistics, only where they became non-finite; and state that must survive from
step to step has to be a persistent buffer, because a resumed run restores nothing else.

The module may have any of these methods:

- `extra_losses()`: weighted loss terms of the last forward pass, by metric name;
- `finish_batch()`, called after each micro-batch, and `finish_step(applied=...)`, called after each
  optimizer step;
- `num_inactive_params()`: number of parameters that a single token does not use.

Any submodule may have a method `router_stats()`, which returns floats by name, so that instruments
treat it as a router; `nonfinite.expose_router` adds this method to a linear gate.
`src.external.interface_check` tests all of this before anything is written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nonfinite.builders import BuilderError, check_form
from src.checkpoint.rebuild import ExternalPart
from src.common.errors import InputError
from src.common.read_checkpoint import EXTERNAL
from src.external.interface_check import (
    check_autocast,
    check_interface,
    logits_of,
    num_inactive_params,
    unsaved_state,
)
from src.external.load_target import call, load_callable, seeded, source_hash
from src.model.architecture import Architecture, GeneratorFor
from src.model.size import BYTES_FLOAT32, Size

ROWS = 2
"""Rows of the batch on which a model is tested."""

CAUSAL_TOLERANCE = 1e-3
"""Relative to the largest logit; rounding differences are smaller, real leaks are larger."""


@dataclass(kw_only=True)
class ExternalConfig:
    """The code that builds an external model."""

    target: str
    """package.module:callable, importable from the folder in which the command runs."""
    kwargs: dict[str, Any]
    """Keyword arguments of the callable."""

    def __post_init__(self) -> None:
        try:
            check_form(self.target)
        except BuilderError as error:
            raise ValueError(f"target={self.target}: {error}") from error


def check_parts(parts: Mapping[str, Any]) -> None:
    """Raises InputError if a built-in model has an external attention or ffn."""
    if isinstance(parts["model"], ExternalConfig):
        return
    for group in ("attention", "ffn"):
        if isinstance(parts[group], ExternalPart):
            raise InputError(f"{group}={EXTERNAL}: needs model={EXTERNAL}")


@dataclass(frozen=True, kw_only=True)
class ExternalModel(Architecture):
    """The Architecture of an external model."""

    config: ExternalConfig
    seq_len: int
    precision: str
    """Of the run, by Lightning's names."""

    @property
    def vocab_size(self) -> int | None:
        return None

    def check(self) -> None:
        load_callable(self.config.target, field="model.target")

    @property
    def _what(self) -> str:
        """Field and value, with which error lines begin."""
        return f"model.target={self.config.target}"

    def facts(self) -> dict[str, Any]:
        """The hash of the source file; after a change in it, the model counts as another one."""
        return {"source": source_hash(self.config.target, field="model.target")}

    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """See Architecture.

        Raises:
            InputError: the callable raises, or does not return a usable language model.
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
                f"{self._what}: gives logits for {num_known} tokens; must be at least the"
                f" tokenizer's {vocab_size}"
            )
        check_interface(model, tokens_BT, what=self._what)
        # Products in float16 are slow on a CPU, where some are missing.
        if self.precision == "bf16-mixed":
            what = f"recipe.precision=bf16-mixed: {self._what}"
            check_autocast(model, tokens_BT, what=what, dtype=torch.bfloat16)
        return model

    def notes(self, model: nn.Module) -> list[str]:
        tokens_BT = torch.zeros(ROWS, self.seq_len, dtype=torch.long)
        notes = [
            f"{self._what}: {name} changes in training but is not a persistent buffer, so a run"
            " that resumes or branches from a saved state starts without it"
            for name in unsaved_state(model, tokens_BT)
        ]
        before = logits_of(model, tokens_BT, what=self._what)
        tokens_BT[:, -1] = 1
        after = logits_of(model, tokens_BT, what=self._what)
        moved = (after - before)[:, :-1].abs().max().item() if self.seq_len > 1 else 0.0
        # Non-finite logits make both sides NaN, and then the comparison is False.
        if moved > CAUSAL_TOLERANCE * before.abs().max().item():
            notes.append(
                f"{self._what}: model is not causal: changing token t alters logits before t"
                f" (max {moved:.2g}), so the loss does not measure next-token prediction"
            )
        return notes

    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """Builds the model and runs it once to count FLOPs."""
        model = self.build(
            vocab_size=vocab_size, generator_for=lambda _: torch.Generator().manual_seed(0)
        )
        tokens_BT = torch.zeros(ROWS, self.seq_len, dtype=torch.long)
        # The FLOP counter does not count fused attention kernels on the CPU.
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
