"""Weights of queries and keys that shrink where attention scores have become too large."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed

from src.common.errors import InputError
from src.stability.base import RemedyConfig, RunFacts, check_positive
from src.stability.remedy_callback import RemedyCallback

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class QKClipConfig(RemedyConfig):
    """QK-Clip of Kimi K2 (arXiv 2507.20534, section 2.1).

    After each optimizer step, for each head h, with the largest score of the step's batch

        S = max over rows and i >= j of q_i . k_j / sqrt(head_dim),   f = min(1, threshold / S):

        W_q <- sqrt(f) W_q,  W_k <- sqrt(f) W_k                      for heads with their own keys
        W_qc <- sqrt(f) W_qc,  W_kc <- sqrt(f) W_kc,  W_qr <- f W_qr  for latent attention

    c are content dimensions and r rotated ones; the rope key, which heads share, stays.

    Grouped-query attention is not in the paper. Query heads that share a key head are scaled
    together, by the factor of the largest of their scores, as in Megatron-LM. Other departures: the
    paper uses Muon, here the optimizer is the recipe's. Neither rescales its moments. A
    step that the guard skipped scales nothing, and a non-finite S never does. With accumulation or
    several devices, S is that of all their rows.

    Logs the largest S (`peak`), the heads above the threshold in this step (`heads`), and their
    number since the start (`total`).
    """

    threshold: float
    """The score above which a head is scaled; above 0."""

    def __post_init__(self) -> None:
        check_positive("threshold", self.threshold)

    def needs(self) -> tuple[str, ...]:
        # A field that every built-in attention has, and a foreign model has not.
        return ("attention.rope_dim",)

    def check(self, parts: Mapping[str, Any]) -> None:
        if parts["attention"].qk_norm:
            raise InputError(
                "attention.qk_norm=true: stability=qk_clip needs false, because a norm after the"
                " projections undoes the scaling of their weights"
            )

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        return [QKClip(self, run)]


class QKClip(RemedyCallback):
    """Scales the weights of every module that has `watch_scores`, and with it `scale_scores`."""

    def __init__(self, config: QKClipConfig, run: RunFacts) -> None:
        self.threshold, self.run = config.threshold, run
        self.total = torch.zeros((), dtype=torch.long)
        self._layers: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._layers = [m for m in pl_module.modules() if hasattr(m, "watch_scores")]
        for layer in self._layers:
            layer.watch_scores()

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        if not self._layers:
            return
        peaks_LH = torch.stack([layer.peaks_H for layer in self._layers])
        if trainer.world_size > 1:
            torch.distributed.all_reduce(peaks_LH, op=torch.distributed.ReduceOp.MAX)
        guard = self.guard_of(trainer)
        is_above_LH = peaks_LH.isfinite() & (peaks_LH > self.threshold)
        if guard is not None and not (guard.applied and guard.finite):
            is_above_LH = torch.zeros_like(is_above_LH)
        # All heads are multiplied, most by exactly 1: to ask which are above would wait for the
        # device.
        factors_LH = torch.where(is_above_LH, self.threshold / peaks_LH, 1.0)
        for layer, factors_H in zip(self._layers, factors_LH, strict=True):
            layer.scale_scores(factors_H)
            layer.watch_scores()
        self.total = self.total.to(peaks_LH.device) + is_above_LH.sum()
        if self.is_log_step(trainer, step):
            values = {"peak": peaks_LH.max(), "heads": is_above_LH.sum(), "total": self.total}
            if values["peak"] == torch.finfo(peaks_LH.dtype).min:
                # The guard skipped the step, and forgot what was seen in it.
                del values["peak"]
            metrics = {f"stability/qk_clip_{name}": float(v) for name, v in values.items()}
            self.log_at(trainer, step, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total = state_dict["total"]
