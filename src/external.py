"""A model that is not ours: `model=external model.target=package.module:callable`.

The callable gives an `nn.Module` that maps token ids (B, T) to logits (B, T, V), on the CPU, in
float32, position t from tokens 0 .. t. It is called with `model.kwargs`, and with `vocab_size` and
`max_seq_len` where it has parameters of these names. What the module draws while it is built comes
from the run's seed, by torch's global generator.

The module may have any of these methods, as ours have:

- `extra_losses()`: weighted terms of the last forward pass that join the loss, by metric name;
- `finish_batch()` after each micro-batch, `finish_step(applied=...)` after each optimizer step;
- `num_inactive_params()`: parameters that a single token does not pass through;

and any module inside it a method `router_stats()`, which gives its figures as floats by name, so
that the instruments read it as a router: `src.watch.expose_router` gives one to a linear gate.
"""

import hashlib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from src.errors import InputError
from src.model.architecture import Architecture, GeneratorFor
from src.model.kinds import EXTERNAL, ExternalPart
from src.model.size import BYTES_FLOAT32, Size
from src.overrides import Override

TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

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


def load_callable(target: str, *, field: str) -> Callable[..., Any]:
    """What a target names.

    Args:
        target: package.module:callable.
        field: what the user typed it for, named in errors.

    Raises:
        InputError: it has another form, cannot be imported, or is not to be called.
    """
    if not TARGET.fullmatch(target):
        raise InputError(f"{field}={target}: must be package.module:callable")
    module, _, path = target.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    # Code of somebody else's may raise anything while it is imported.
    except Exception as error:
        raise InputError(f"{field}={target}: {_said(error)}") from error
    if not callable(found):
        raise InputError(f"{field}={target}: is a {type(found).__name__}, nothing to be called")
    called: Callable[..., Any] = found
    return called


def call(
    target: str,
    kwargs: dict[str, Any],
    *,
    field: str,
    vocab_size: int | None,
    max_seq_len: int | None,
) -> nn.Module:
    """The module that a target gives.

    Args:
        target: package.module:callable.
        kwargs: its keyword arguments.
        field: what the user typed it for, named in errors.
        vocab_size: handed over where it has a parameter of this name; None: unknown.
        max_seq_len: the same.

    Raises:
        InputError: it raises, or gives something else.
    """
    build = load_callable(target, field=field)
    known = {"vocab_size": vocab_size, "max_seq_len": max_seq_len}
    try:
        parameters = inspect.signature(build).parameters
        wanted = {n: v for n, v in known.items() if n in parameters and v is not None}
        model = build(**{**wanted, **kwargs})
    except Exception as error:
        raise InputError(f"{field}={target}: {_said(error)}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{field}={target}: gives a {type(model).__name__}, must be an nn.Module")
    return model


def _said(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


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

    def facts(self) -> dict[str, Any]:
        """The hash of the file that it is built by, whose change is another model."""
        source = inspect.getsourcefile(
            inspect.unwrap(load_callable(self.config.target, field="model.target"))
        )
        assert source is not None
        return {"source": hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]}

    def build(self, *, vocab_size: int, generator_for: GeneratorFor) -> nn.Module:
        """See Architecture.

        Raises:
            InputError: the callable raises, or what it gives is no language model of so many
                tokens.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator_for(EXTERNAL).initial_seed())
            model = call(
                self.config.target,
                dict(self.config.kwargs),
                field="model.target",
                vocab_size=vocab_size,
                max_seq_len=self.seq_len,
            )
        num_known = self._logits(model, torch.zeros(1, self.seq_len, dtype=torch.long)).shape[-1]
        if num_known < vocab_size:
            raise InputError(
                f"model.target={self.config.target}: gives logits of {num_known} tokens, must be"
                f" at least the tokenizer's {vocab_size}"
            )
        return model

    def _logits(self, model: nn.Module, tokens_BT: Tensor) -> Tensor:
        """Of one forward pass in evaluation mode, which leaves the model as it was."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                logits = model(tokens_BT)
        except Exception as error:
            raise InputError(
                f"model.target={self.config.target}: token ids of shape {tuple(tokens_BT.shape)}:"
                f" {_said(error)}"
            ) from error
        finally:
            model.train(was_training)
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if not isinstance(logits, Tensor) or logits.shape[:-1] != tokens_BT.shape:
            raise InputError(
                f"model.target={self.config.target}: token ids of shape {tuple(tokens_BT.shape)}"
                f" give {shape}, must give a tensor (batch, time, vocabulary)"
            )
        return logits

    def notes(self, model: nn.Module) -> list[str]:
        """See Architecture."""
        tokens_BT = torch.zeros(1, self.seq_len, dtype=torch.long)
        before = self._logits(model, tokens_BT)
        tokens_BT[0, -1] = 1
        after = self._logits(model, tokens_BT)
        moved = (after - before)[:, :-1].abs().max().item() if self.seq_len > 1 else 0.0
        if moved <= CAUSAL_TOLERANCE * before.abs().max().item():
            return []
        return [
            f"model.target={self.config.target}: a token changes the logits before it, by up to"
            f" {moved:.2g}: the loss is none of prediction"
        ]

    def measure(self, *, vocab_size: int, averaged_weights: bool = False) -> Size:
        """See Architecture; builds the model and runs it once, for what nobody has declared."""
        model = self.build(
            vocab_size=vocab_size, generator_for=lambda _: torch.Generator().manual_seed(0)
        )
        tokens_BT = torch.zeros(1, self.seq_len, dtype=torch.long)
        # Fused kernels of attention count nothing on the CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            logits_BTV = self._logits(model, tokens_BT)
        forward = counter.get_total_flops() // self.seq_len
        total = sum(parameter.numel() for parameter in model.parameters())
        by_part: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            part = name.rpartition(".")[0].partition(".")[0] or name
            by_part[part] = by_part.get(part, 0) + parameter.numel()
        inactive = getattr(model, "num_inactive_params", lambda: 0)()
        return Size(
            params_total=total,
            params_active=total - inactive,
            params_by_part=by_part,
            vocab_size=logits_BTV.shape[-1],
            cache_bytes_per_token=None,
            decoding="unknown: an external model",
            flops_per_token=3 * forward,
            forward_flops_per_token=forward,
            checkpoint_bytes=total * BYTES_FLOAT32 * (3 + averaged_weights),
        )
