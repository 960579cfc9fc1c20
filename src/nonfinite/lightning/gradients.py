"""Statistics of gradients, updates and AdamW's moments, by parameter group."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from nonfinite.config import check_interval
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.step_callback import StepCallback, is_log_step, log

GROUPS = (
    ("latents", ("q_down", "kv_down", "q_up", "k_up", "v_up", "k_rope", "latent_norm")),
    ("router", ("router",)),
    ("experts", ("experts",)),
    ("attention", ("attention", "self_attn", "attn")),
    ("embedding", ("embedding", "embed_tokens", "wte")),
    ("head", ("head", "lm_head")),
)
"""A parameter belongs to the first group with a mark in its path, else to its module prefix."""

MAX_SAMPLED = 2**20

SMALL_MOMENT = 10.0
"""If sqrt(v) is below this multiple of epsilon, epsilon dominates and AdamW acts like SGD."""


def group_of(name: str) -> str:
    """The group of a parameter, from its path."""
    path = name.split(".")
    for group, marks in GROUPS:
        if any(mark in part for part in path for mark in marks):
            return group
    return path[-2] if len(path) > 1 else path[0]


class GradientWatch(StepCallback):
    """Logs statistics of each parameter group on logged steps.

    - `grad/<group>/norm` and `clipped_norm`: gradient norm before and after clipping.
    - `update/<group>/ratio`: RMS(update) / RMS(parameter), over at most about a million evenly
      spread entries of each tensor, so that no second copy of a large model is held.
    - `adam/<group>/rms`: square root of mean(g^2 / max(v, eps^2)) (StableAdamW, arXiv 2304.13013,
      section 3.3). Values above 2 to 3 precede a spike.
    - `adam/<group>/small_frac`: share of entries whose bias-corrected sqrt(v) is below 10 eps.
    - `adam/<group>/moment_max`: the largest v, without bias correction.
    - `grad/nonfinite_tensors`: number of non-finite gradient tensors in all steps so far, including
      steps that the guard dropped.

    `adam/` is missing for optimizers that do not keep moments as AdamW does.
    """

    def __init__(self, *, every: int) -> None:
        check_interval(every)
        self.every = every
        self._before: dict[str, Tensor] = {}
        self._metrics: dict[str, Tensor] = {}
        self._handle: Any = None
        self.num_nonfinite = 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Registers with the guard, to see gradients before it drops them."""
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
        return {"num_nonfinite": self.num_nonfinite}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_nonfinite = state_dict["num_nonfinite"]

    def _is_due(self, trainer: pl.Trainer) -> bool:
        return is_log_step(trainer, trainer.global_step + 1, every=self.every)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Measures norms before clipping; adds a hook that measures the update after it."""
        self._metrics = {}
        if not self._is_due(trainer):
            return
        groups = _grouped(pl_module)
        gradients = {g: _gradients(ps) for g, ps in groups.items()}
        flat = [gradient for values in gradients.values() for gradient in values]
        if not flat:
            return
        count = flat[0].new_tensor(float(self.num_nonfinite), dtype=torch.float32)
        self._metrics["grad/nonfinite_tensors"] = count
        for group, values in gradients.items():
            if values:
                norm = torch.nn.utils.get_total_norm(values)
                self._metrics[f"grad/{group}/norm"] = norm
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
        metrics = self._metrics
        metrics[f"grad/{group}/clipped_norm"] = torch.nn.utils.get_total_norm(gradients)
        moved, held = [], []
        for name, parameter in params.items():
            if parameter.grad is not None:
                # Each sampled entry represents `stride` entries, hence the weight.
                weight = math.sqrt(_stride(parameter))
                moved.append((_sample(parameter) - self._before[name]) * weight)
                held.append(self._before[name] * weight)
        ratio = torch.nn.utils.get_total_norm(moved) / torch.nn.utils.get_total_norm(held)
        metrics[f"update/{group}/ratio"] = ratio
        squares, small, largest, count = [], [], [], 0
        for parameter in params.values():
            state = optimizer.state.get(parameter, {})
            group_settings = settings.get(id(parameter), {})
            if parameter.grad is None or not _has_adam_moments(state, group_settings, parameter):
                continue
            floor = group_settings["eps"]
            moment = state["exp_avg_sq"] / (1 - group_settings["betas"][1] ** state["step"])
            scaled = parameter.grad.square() / moment.clamp(min=max(floor**2, 1e-38))
            squares.append(scaled.sum())
            small.append((moment < (SMALL_MOMENT * floor) ** 2).sum())
            largest.append(state["exp_avg_sq"].max())
            count += moment.numel()
        if count:
            metrics[f"adam/{group}/rms"] = (torch.stack(squares).sum() / count).sqrt()
            metrics[f"adam/{group}/small_frac"] = torch.stack(small).sum() / count
            metrics[f"adam/{group}/moment_max"] = torch.stack(largest).max()

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Logs the statistics, with a single synchronisation with the device."""
        if self._metrics:
            values = torch.stack([value.float() for value in self._metrics.values()]).tolist()
            metrics = dict(zip(self._metrics, values, strict=True))
            log(trainer, {k: v for k, v in metrics.items() if math.isfinite(v)}, step=step)
            self._metrics = {}


def _grouped(task: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in task.named_parameters():
        groups.setdefault(group_of(name), {})[name] = parameter
    return groups


def _has_adam_moments(
    state: Mapping[str, Any], settings: Mapping[str, Any], parameter: nn.Parameter
) -> bool:
    """Whether the state holds AdamW's second moment for each entry of the parameter.

    Other optimizers, such as Adafactor, keep something else under the same name.
    """
    moment, eps = state.get("exp_avg_sq"), settings.get("eps")
    has_steps = "betas" in settings and "step" in state and isinstance(eps, int | float)
    fits = isinstance(moment, Tensor) and moment.shape == parameter.shape and moment.numel() > 0
    return has_steps and fits


def _stride(parameter: Tensor) -> int:
    """Distance of sampled entries; odd, so that samples do not align with rows of 2^n."""
    return math.ceil(parameter.numel() / MAX_SAMPLED) | 1


def _sample(parameter: Tensor) -> Tensor:
    return parameter.detach().reshape(-1)[:: _stride(parameter)]


def _gradients(params: dict[str, nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params.values() if p.grad is not None]
