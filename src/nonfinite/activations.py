"""Activations, attention and output on one batch, every so often."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nonfinite.config import check_interval
from nonfinite.rerun import undisturbed
from nonfinite.step_callback import StepCallback, is_log_step, log

CORNER = 64
"""Positions of a row whose attention is looked at."""

ROWS = 256
"""Targets whose logits are there at once, where the loss has them in pieces."""


class ActivationWatch(StepCallback):
    """Looks at the training batch's own forward pass on logged steps.

    `act/layer_<i>/rms` and `absmax` are those of what each block gives out, a block being an entry
    of the longest outermost module list; `attention/layer_<i>/max_logit` and `entropy` are of the
    first row and the first 64 positions at each call of scaled_dot_product_attention, entropy in
    nats, mean over heads and queries. `output/logsumexp` is that of the logits which the first call
    of torch's cross_entropy gets, or of its linear_cross_entropy makes, mean over its targets;
    without such a call it is not there. Where
    a module has children `experts` and `shared`, `act/layer_<i>/experts_rms` and `shared_rms`
    compare them. What is no tensor of real numbers, or the first of a tuple, is left out.

    Args:
        every: steps between those that are looked at.
        apart: look at a forward pass of its own beside the training's, which may then be compiled.
    """

    def __init__(self, *, every: int, apart: bool = False) -> None:
        check_interval(every)
        self.every, self.apart = every, apart
        self.figures: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._probe: _Probe | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Hooks the blocks for this batch where the step will be logged."""
        if not is_log_step(trainer, trainer.global_step + 1, every=self.every) or self._handles:
            return
        for index, block in enumerate(_blocks(pl_module)):
            self._handles.append(block.register_forward_hook(self._block_hook(index)))
        mixtures = [m for m in pl_module.modules() if _is_mixture(m)]
        for index, mixture in enumerate(mixtures):
            for part in ("experts", "shared"):
                hook = self._rms_hook(f"act/layer_{index}/{part}_rms")
                self._handles.append(getattr(mixture, part).register_forward_hook(hook))
        self._probe = _Probe(self.figures)
        self._probe.__enter__()
        if self.apart:
            precision = trainer.precision_plugin.train_step_context
            with undisturbed(pl_module), torch.no_grad(), precision():
                pl_module.training_step(batch, batch_idx)
            self._unhook()

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        """The forward pass is over: takes the hooks away."""
        self._unhook()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Takes them away where there was no backward pass."""
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
        """Leaves nothing behind."""
        self._unhook()

    def _block_hook(self, index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = _activations(output)
            if x is not None:
                self.figures[f"act/layer_{index}/rms"] = x.square().mean().sqrt()
                self.figures[f"act/layer_{index}/absmax"] = x.abs().max()

        return hook

    def _rms_hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = _activations(output)
            if x is not None:
                self.figures[name] = x.square().mean().sqrt()

        return hook

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs what was seen."""
        if self.figures:
            values = torch.stack([value.float() for value in self.figures.values()]).tolist()
            seen = dict(zip(self.figures, values, strict=True))
            log(trainer, {k: v for k, v in seen.items() if math.isfinite(v)}, step=step)
            self.figures.clear()


def _activations(output: Any) -> Tensor | None:
    """What a module gives out, or the first of several, in float32; None: nothing to measure."""
    x = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
        return None
    return x.detach().float()


class _Probe(TorchFunctionMode):
    """Computes scores anew, on a corner of them, at each attention call; looks at the logits."""

    def __init__(self, figures: dict[str, Tensor]) -> None:
        super().__init__()
        self.figures, self.calls, self.has_logits = figures, 0, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_attention(func):
            self._look(corner_scores(*args, **kwargs))
        elif func is functional.cross_entropy and not self.has_logits:
            self._look_at_logits(args[0] if args else kwargs["input"])
        elif _is_linear_cross_entropy(func, args) and not self.has_logits:
            self._look_at_products(args[0], args[1], kwargs.get("linear_bias"))
        return func(*args, **kwargs)

    @torch.no_grad()
    def _look(self, scores: Tensor | None) -> None:
        if scores is None:
            return
        log_p = scores.log_softmax(dim=-1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=-1).mean()
        self.figures[f"attention/layer_{self.calls}/max_logit"] = scores.max()
        self.figures[f"attention/layer_{self.calls}/entropy"] = entropy
        self.calls += 1

    @torch.no_grad()
    def _look_at_logits(self, logits: Tensor) -> None:
        """Classes are the second axis, or the only one."""
        self.has_logits = True
        dim = min(1, logits.dim() - 1)
        self.figures["output/logsumexp"] = logits.detach().float().logsumexp(dim=dim).mean()

    @torch.no_grad()
    def _look_at_products(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Of logits that are never there all at once: row by row of a few."""
        self.has_logits = True
        partitions = [
            functional.linear(rows, weight, bias).float().logsumexp(dim=-1)
            for rows in states.detach().split(ROWS)
        ]
        self.figures["output/logsumexp"] = torch.cat(partitions).mean()


def _is_linear_cross_entropy(func: Any, args: Any) -> bool:
    """Whether it makes logits of states (targets, hidden) and a weight (classes, hidden) itself."""
    is_one = getattr(func, "__name__", None) == "linear_cross_entropy"
    return is_one and [x.dim() for x in args[:2]] == [2, 2]


def is_attention(func: Any) -> bool:
    """Whether it is PyTorch's attention, or one that takes its place under its name."""
    name: str = functional.scaled_dot_product_attention.__name__
    return getattr(func, "__name__", None) == name


def corner_scores(
    query: Tensor, key: Tensor, *args: Any, scale: float | None = None, **kwargs: Any
) -> Tensor | None:
    """Causal scores of the first row and the first 64 positions, float32, later ones -inf.

    Args:
        query, key: (batch, heads, time, head); None comes back where they have other axes.
        args, kwargs: what else scaled_dot_product_attention takes.
        scale: of the scores; None: 1 / sqrt(head).
    """
    if query.dim() != 4 or query.is_nested:
        return None
    q, k = (t[:1, :, :CORNER].detach().float() for t in (query, key))
    if k.shape[1] != q.shape[1]:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -math.inf)


def _is_mixture(module: torch.nn.Module) -> bool:
    """Whether it adds shared experts to routed ones, both of which are modules."""
    parts = (getattr(module, name, None) for name in ("experts", "shared"))
    return all(isinstance(part, torch.nn.Module) for part in parts)


def _blocks(task: torch.nn.Module) -> list[torch.nn.Module]:
    """The entries of the longest module list, which in a transformer are its layers.

    Lists inside others, such as the experts of a layer, do not count, however long.
    """
    paths = [n for n, m in task.named_modules() if isinstance(m, torch.nn.ModuleList)]
    outer = [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
    lists = [list(task.get_submodule(path).children()) for path in outer]
    return max(lists, key=len, default=[])
