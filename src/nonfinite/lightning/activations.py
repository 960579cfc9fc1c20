"""Statistics of activations, attention and output logits on logged steps."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nonfinite.attention_scores import corner_scores, is_attention
from nonfinite.config import check_interval
from nonfinite.lightning.step_callback import StepCallback, is_log_step, log
from nonfinite.rerun import undisturbed

ROWS = 256
"""Targets whose logits are computed at once, if the loss computes logits in pieces."""


class ActivationWatch(StepCallback):
    """Measures the forward pass of the training batch on logged steps.

    - `act/layer_<i>/rms` and `absmax` describe the output of each block. Blocks are the entries of
      the longest outermost module list.
    - `attention/layer_<i>/max_logit` and `entropy` (nats, mean over heads and queries) describe the
      first row and the first 64 positions of each call of scaled_dot_product_attention.
    - `output/logsumexp` is the mean over targets of the logits' logsumexp. It is taken at the first
      call of torch's cross_entropy or linear_cross_entropy, and missing if neither is called.
    - `act/layer_<i>/experts_rms` and `shared_rms` compare the children `experts` and `shared` of a
      module that has both.

    Of a tuple, the first entry is measured. Anything but a tensor of real numbers is ignored.

    Args:
        every: optimizer steps between measured ones.
        apart: measure an extra forward pass, so that the training's own may be compiled.
    """

    def __init__(self, *, every: int, apart: bool = False) -> None:
        check_interval(every)
        self.every, self.apart = every, apart
        self.metrics: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._probe: _Probe | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hooks the blocks for this batch if the step will be logged."""
        if not is_log_step(trainer, trainer.global_step + 1, every=self.every) or self._handles:
            return
        for index, block in enumerate(_blocks(pl_module)):
            self._handles.append(block.register_forward_hook(self._block_hook(index)))
        mixtures = [m for m in pl_module.modules() if _is_mixture(m)]
        for index, mixture in enumerate(mixtures):
            for part in ("experts", "shared"):
                hook = self._rms_hook(f"act/layer_{index}/{part}_rms")
                self._handles.append(getattr(mixture, part).register_forward_hook(hook))
        self._probe = _Probe(self.metrics)
        self._probe.__enter__()
        if self.apart:
            precision = trainer.precision_plugin.train_step_context
            with undisturbed(pl_module), torch.no_grad(), precision():
                pl_module.training_step(batch, batch_idx)
            self._unhook()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """Removes the hooks, because the forward pass is over."""
        self._unhook()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Removes the hooks if there was no backward pass."""
        self._unhook()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._probe is not None:
            self._probe.__exit__(None, None, None)
            self._probe = None

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._unhook()

    def _block_hook(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = _activations(output)
            if x is not None:
                self.metrics[f"act/layer_{index}/rms"] = x.square().mean().sqrt()
                self.metrics[f"act/layer_{index}/absmax"] = x.abs().max()

        return hook

    def _rms_hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = _activations(output)
            if x is not None:
                self.metrics[name] = x.square().mean().sqrt()

        return hook

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if self.metrics:
            values = torch.stack([value.float() for value in self.metrics.values()]).tolist()
            seen = dict(zip(self.metrics, values, strict=True))
            log(trainer, {k: v for k, v in seen.items() if math.isfinite(v)}, step=step)
            self.metrics.clear()


def _activations(output: Any) -> Tensor | None:
    """A module's output, or the first of several, in float32; None if it cannot be measured."""
    x = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return None
    return x.detach().float()


class _Probe(TorchFunctionMode):
    """Recomputes a corner of the scores at each attention call, and measures the output logits."""

    def __init__(self, metrics: dict[str, Tensor]) -> None:
        super().__init__()
        self.metrics, self.calls, self.has_logits = metrics, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_attention(func):
            self._measure_attention(corner_scores(*args, **kwargs))
        elif func is functional.cross_entropy and not self.has_logits:
            self._measure_logits(args[0] if args else kwargs["input"])
        elif _is_linear_cross_entropy(func, args) and not self.has_logits:
            self._measure_products(args[0], args[1], kwargs.get("linear_bias"))
        return func(*args, **kwargs)

    @torch.no_grad()
    def _measure_attention(self, scores: Tensor | None) -> None:
        if scores is None:
            return
        log_p = scores.log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1).mean()
        self.metrics[f"attention/layer_{self.calls}/max_logit"] = scores.max()
        self.metrics[f"attention/layer_{self.calls}/entropy"] = entropy
        self.calls += 1

    @torch.no_grad()
    def _measure_logits(self, logits: Tensor) -> None:
        """Classes are the second axis of the logits, or the only one, as torch defines it."""
        self.has_logits = True
        dim = min(1, logits.dim() - 1)
        self.metrics["output/logsumexp"] = logits.detach().float().logsumexp(dim=dim).mean()

    @torch.no_grad()
    def _measure_products(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """As `_measure_logits`, from states and weight, without holding all logits at once."""
        self.has_logits = True
        partitions = [
            functional.linear(rows, weight, bias).float().logsumexp(dim=-1)
            for rows in states.detach().split(ROWS)
        ]
        self.metrics["output/logsumexp"] = torch.cat(partitions).mean()


def _is_linear_cross_entropy(func: Any, args: Any) -> bool:
    """Whether a function computes logits from states (targets, hidden) and a weight itself."""
    is_one = getattr(func, "__name__", None) == "linear_cross_entropy"
    return is_one and [x.dim() for x in args[:2]] == [2, 2]


def _is_mixture(module: torch.nn.Module) -> bool:
    """Whether a module has both routed and shared experts as child modules."""
    parts = (getattr(module, name, None) for name in ("experts", "shared"))
    return all(isinstance(part, torch.nn.Module) for part in parts)


def _blocks(task: torch.nn.Module) -> list[torch.nn.Module]:
    """The entries of the longest module list, which are the layers of a transformer.

    Lists inside other lists, such as the experts of a layer, do not count.
    """
    paths = [n for n, m in task.named_modules() if isinstance(m, torch.nn.ModuleList)]
    outer = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    lists = [list(task.get_submodule(path).children()) for path in outer]
    return max(lists, key=len, default=[])
