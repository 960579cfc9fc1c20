"""Gradients, updates and AdamW's moments, by group of parameters."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from nonfinite.config import check_interval
from nonfinite.guard import StepGuard
from nonfinite.step_callback import StepCallback, is_log_step, log

GROUPS = (
    ("latents", ("q_down", "kv_down", "q_up", "k_up", "v_up", "k_rope", "latent_norm")),
    ("router", ("router",)),
    ("experts", ("experts",)),
    ("attention", ("attention", "self_attn", "attn")),
    ("embedding", ("embedding", "embed_tokens", "wte")),
    ("head", ("head", "lm_head")),
)
"""The first group whose mark is part of a parameter's path; the rest goes by module prefix."""

MAX_SAMPLED = 2**20

SMALL_MOMENT = 10.0
"""Where sqrt(v) is below so many epsilons, epsilon rules and AdamW turns into SGD."""


def group_of(name: str) -> str:
    """The group of a parameter by its path: a part that the field knows, else the module prefix."""
    path = name.split(".")
    for group, marks in GROUPS:
        if any(mark in part for part in path for mark in marks):
            return group
    return path[-2] if len(path) > 1 else path[0]


class GradientWatch(StepCallback):
    """On logged steps, for each group: norms, the size of the update, AdamW's RMS_t.

    `grad/<group>/norm` and `clipped_norm` are those of the gradient before and after clipping;
    `update/<group>/ratio` is RMS(update) / RMS(parameter); `adam/<group>/rms` is the square root of
    mean(g^2 / max(v, eps^2)) (StableAdamW, arXiv 2304.13013, section 3.3), of which values above 2
    to 3 come before a spike; `adam/<group>/small_frac` is the share of entries whose sqrt(v) is
    below 10 eps, v without its bias towards 0; `adam/<group>/moment_max` is the largest v as it is
    kept. The ratio is taken on at most about a million entries of each tensor, evenly spread, so
    that no second copy of a large model is held. Of optimizers that keep no moments as AdamW does
    there is no `adam/`.
    `grad/nonfinite_tensors` counts gradient tensors that were not finite, in all steps so far,
    those included that the guard dropped.
    """

    def __init__(self, *, every: int) -> None:
        check_interval(every)
        self.every = every
        self._before: dict[str, Tensor] = {}
        self._figures: dict[str, Tensor] = {}
        self._handle: Any = None
        self.num_nonfinite = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Asks the guard to show gradients that it is about to drop."""
        guard = StepGuard.of(trainer)
        if guard is not None:
            guard.add_observer(self._count_nonfinite)

    def _count_nonfinite(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        finite: bool,
    ) -> None:
        if not finite:
            gradients = [p.grad for p in task.parameters() if p.grad is not None]
            self.num_nonfinite += sum(not bool(g.isfinite().all()) for g in gradients)

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"num_nonfinite": self.num_nonfinite}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it up again."""
        self.num_nonfinite = state_dict["num_nonfinite"]

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return is_log_step(trainer, trainer.global_step + 1, every=self.every)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Takes the norms before clipping; asks to be called again right before the update."""
        self._figures = {}
        if not self._is_due(trainer):
            return
        groups = _grouped(pl_module)
        gradients = {g: _gradients(ps) for g, ps in groups.items()}
        flat = [gradient for values in gradients.values() for gradient in values]
        if not flat:
            return
        count = flat[0].new_tensor(float(self.num_nonfinite), dtype=torch.float32)
        self._figures["grad/nonfinite_tensors"] = count
        for group, values in gradients.items():
            if values:
                norm = torch.nn.utils.get_total_norm(values)
                self._figures[f"grad/{group}/norm"] = norm
        self._handle = optimizer.register_step_post_hook(self._after_update(pl_module, optimizer))
        self._before = {n: _sample(p).clone() for n, p in pl_module.named_parameters()}

    def _after_update(
        self, task: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> Callable[..., None]:
        def after(*args: Any) -> None:
            self._handle.remove()
            settings = {id(p): g for g in optimizer.param_groups for p in g["params"]}
            for group, params in _grouped(task).items():
                self._measure(group, params, optimizer, settings)
            self._before = {}

        return after

    def _measure(
        self,
        group: str,
        params: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        settings: dict[int, dict[str, Any]],
    ) -> None:
        gradients = _gradients(params)
        if not gradients:
            return
        figures = self._figures
        figures[f"grad/{group}/clipped_norm"] = torch.nn.utils.get_total_norm(gradients)
        moved, held = [], []
        for name, parameter in params.items():
            if parameter.grad is not None:
                # A sample stands for so many entries.
                weight = math.sqrt(_stride(parameter))
                moved.append((_sample(parameter) - self._before[name]) * weight)
                held.append(self._before[name] * weight)
        ratio = torch.nn.utils.get_total_norm(moved) / torch.nn.utils.get_total_norm(held)
        figures[f"update/{group}/ratio"] = ratio
        squares, small, largest, count = [], [], [], 0
        for parameter in params.values():
            state = optimizer.state.get(parameter, {})
            group_settings = settings.get(id(parameter), {})
            if parameter.grad is None or not _is_adams(state, group_settings, parameter):
                continue
            floor = group_settings["eps"]
            moment = state["exp_avg_sq"] / (1 - group_settings["betas"][1] ** state["step"])
            scaled = parameter.grad.square() / moment.clamp(min=max(floor**2, 1e-38))
            squares.append(scaled.sum())
            small.append((moment < (SMALL_MOMENT * floor) ** 2).sum())
            largest.append(state["exp_avg_sq"].max())
            count += moment.numel()
        if count:
            figures[f"adam/{group}/rms"] = (torch.stack(squares).sum() / count).sqrt()
            figures[f"adam/{group}/small_frac"] = torch.stack(small).sum() / count
            figures[f"adam/{group}/moment_max"] = torch.stack(largest).max()

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs what was taken, with one wait for the device."""
        if self._figures:
            values = torch.stack([value.float() for value in self._figures.values()]).tolist()
            figures = dict(zip(self._figures, values, strict=True))
            log(trainer, {k: v for k, v in figures.items() if math.isfinite(v)}, step=step)
            self._figures = {}


def _grouped(task: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        groups.setdefault(group_of(name), {})[name] = parameter
    return groups


def _is_adams(
    state: Mapping[str, Any], settings: Mapping[str, Any], parameter: nn.Parameter
) -> bool:
    """Whether there is a second moment for each entry, made and used as AdamW does it.

    Other optimizers keep one under the same name, as Adafactor, whose decay is another.
    """
    moment, eps = state.get("exp_avg_sq"), settings.get("eps")
    has_steps = "betas" in settings and "step" in state and isinstance(eps, int | float)
    fits = isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.numel() > 0
    return has_steps and fits


def _stride(parameter: Tensor) -> int:
    """Odd, so that it does not fall in step with rows whose lengths are powers of two."""
    return math.ceil(parameter.numel() / MAX_SAMPLED) | 1


def _sample(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:: _stride(parameter)]


def _gradients(params: dict[str, nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params.values() if p.grad is not None]
