"""The incident recorder: reruns a non-finite step under the tracer, and saves what it finds."""

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from nonfinite.builders import with_name
from nonfinite.causes import LOOKED_AT, Evidence
from nonfinite.finding import Finding
from nonfinite.incident_files import json_safe, with_plain_values
from nonfinite.lightning.guard import StepGuard
from nonfinite.lightning.rerun_step import rerun_loss
from nonfinite.lightning.step_callback import StepCallback
from nonfinite.muting import is_muted
from nonfinite.recording import (
    Rerun,
    largest_gradients,
    lines_of,
    make_incident,
    make_spike,
    run_again,
    save,
    second_moment_finite,
    unrecorded,
    weight_absmax,
)
from nonfinite.rerun import Routers, router_state, routers_of, undisturbed
from nonfinite.snapshot import host_states
from nonfinite.spike_rule import guilty_row, is_spike, num_rows, with_rows
from nonfinite.tracer import Tracer, trace

logger = logging.getLogger(__name__)

OVERRIDABLE = ("norm_eps", "bias_frozen")
"""Attributes of routers that remedies set during a run."""

RING = 256
"""Number of last steps whose metrics are kept for the page."""


class IncidentRecorder(StepCallback):
    """Records the first non-finite step of a run with the operation that caused it, and one spike.

    Reruns the step's batches with the weights, router biases and random state that they had, and
    restores everything afterwards, so that training continues bitwise as without the recorder.
    Needs a StepGuard among the trainer's callbacks.

    Args:
        folder: incidents are saved to <folder>/step-<n>/. Batches are saved as tensors and plain
            values: mappings become dicts, arrays become tensors.
        say: shows one line to the user.
        extras: plain values to add to the saved state, such as the configuration.
        repeat: the command that reruns the step, with `{folder}` for the incident's folder and
            `{model}` for the name of what builds the module.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        say: Callable[[str], None] = print,
        extras: Mapping[str, Any] | None = None,
        repeat: str = "python -m src.diagnose checkpoint={folder} target={model}",
    ) -> None:
        self.folder, self.say, self.extras = Path(folder), say, extras or {}
        self.repeat = repeat
        self.latest: dict[str, float] = {}
        self.incident: dict[str, Any] | None = None
        self.spike_step: int | None = None
        self.ring: deque[dict[str, float]] = deque(maxlen=RING)
        self._batches: list[dict[str, Any]] = []
        self._is_muted = False
        self._routers: Routers = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Registers with the guard, to be called before it drops a step."""
        guard = StepGuard.of(trainer)
        if guard is None:
            raise ValueError("the incident recorder needs a StepGuard among the callbacks")
        guard.add_observer(self._observe)
        self._is_muted = is_muted()
        self._routers = routers_of(pl_module)

    def read_metrics(self, trainer: pl.Trainer, metrics: Mapping[str, float], *, step: int) -> None:
        """Keeps the last finite value of each metric that the rules for causes use."""
        for name in LOOKED_AT:
            value = metrics.get(name, math.nan)
            if math.isfinite(value):
                self.latest[name] = value

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the inputs of this batch's forward pass, which may change afterwards."""
        if self.incident is None or self.spike_step is None:
            cuda = torch.cuda.is_initialized()
            self._batches.append(
                {
                    "batch": batch,
                    "batch_idx": batch_idx,
                    "rng": torch.get_rng_state(),
                    "host_rng": host_states(),
                    "cuda_rng": torch.cuda.get_rng_state() if cuda else None,
                    "router_state": router_state(self._routers),
                    "buffers": self._guard(trainer).buffers_before[-1],
                }
            )

    @staticmethod
    def _guard(trainer: pl.Trainer) -> StepGuard:
        guard = StepGuard.of(trainer)
        assert guard is not None
        return guard

    def on_step_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Adds the step to the ring."""
        guard = self._guard(trainer)
        assert guard.loss is not None
        assert guard.grad_norm is not None
        loss, norm = torch.stack((guard.loss, guard.grad_norm)).tolist()
        self.ring.append(
            {"step": step, "loss": loss, "grad_norm": norm, **_router_means(self._routers)}
        )
        self._batches.clear()

    def _observe(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        finite: bool,
    ) -> None:
        step = trainer.global_step + 1
        if self._is_muted:
            return
        if not finite and self.incident is None:
            self.incident = self._try_record(trainer, pl_module, optimizer, step, "non-finite")
        elif finite and self.spike_step is None:
            norms = [entry["grad_norm"] for entry in self.ring]
            if is_spike(_grad_norm(trainer), norms):
                self.spike_step = step
                self._try_record(trainer, pl_module, optimizer, step, "spike")

    def _try_record(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        step: int,
        kind: str,
    ) -> dict[str, Any] | None:
        """Records an incident; an error in the recorder is reported and never stops the run.

        With several processes, each reruns its own batches, and the first one that finds something
        saves the incident. All processes return it, or None if there is nothing to record.
        """
        found: Exception | Rerun
        try:
            found = self._rerun(trainer, task, kind)
        except Exception as error:
            found = error
        has_finding = isinstance(found, Rerun) and found.finding is not None
        writer = _first_rank_with_finding(trainer, has_finding)
        incident = None
        if trainer.global_rank == writer:
            try:
                if isinstance(found, Exception):
                    raise found
                incident = self._record(trainer, task, optimizer, step, kind, found)
            except Exception as error:
                logger.exception("the incident could not be recorded")
                incident = unrecorded(step, kind, error)
        if trainer.world_size > 1:
            incident = trainer.strategy.broadcast(incident, src=writer)
        if incident is None:
            return None
        lines = [*lines_of(incident), *incident.pop("remarks", ())]
        if trainer.is_global_zero:
            for line in lines:
                self.say(line)
        return incident

    def _rerun(self, trainer: pl.Trainer, task: pl.LightningModule, kind: str) -> Rerun:
        """Reruns the step, unless its update is to blame, which comes after all that is rerun."""
        if self._guard(trainer).fault is not None:
            return Rerun(router={})
        passes = [self._pass(trainer, entry) for entry in self._batches]
        return run_again(task, passes, measures_growth=kind == "spike")

    def _pass(
        self, trainer: pl.Trainer, entry: Mapping[str, Any]
    ) -> Callable[[nn.Module, Tracer], Finding | None]:
        precision, accumulate = trainer.precision_plugin.train_step_context, len(self._batches)

        def run(task: nn.Module, tracer: Tracer) -> Finding | None:
            batch = entry["batch"]
            if task is not trainer.lightning_module:
                # A copy of the module is run on the CPU.
                batch = move_data_to_device(batch, torch.device("cpu"))
            given = {**entry, "batch": batch}
            loss_of = rerun_loss(task, given, precision, accumulate=accumulate)
            return trace(task, loss_of, tracer, batch=batch)

        return run

    def _record(
        self,
        trainer: pl.Trainer,
        task: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
        step: int,
        kind: str,
        rerun: Rerun,
    ) -> dict[str, Any] | None:
        guard = self._guard(trainer)
        nothing = rerun.finding is None and guard.fault is None
        if kind == "non-finite" and nothing and _scales_loss(trainer):
            return None
        assert guard.loss is not None
        if kind == "spike":
            incident = make_spike(
                step,
                _grad_norm(trainer),
                rerun,
                row=self._guilty_row(trainer, task),
                largest_gradients=largest_gradients(task),
            )
        else:
            evidence = Evidence(
                finding=rerun.finding,
                router=rerun.router,
                second_moment_finite=guard.fault is not None or second_moment_finite(optimizer),
                weight_absmax=weight_absmax(task),
                last=self.latest,
                update=guard.fault,
                why_finite=rerun.why_finite,
            )
            incident = make_incident(
                step,
                evidence,
                rerun,
                drift=self._drift(rerun.finding),
                largest_gradients=largest_gradients(task),
            )
        remarks = save(
            self.folder / f"step-{step}",
            incident,
            self._state(trainer, task),
            list(self.ring),
            command=with_name(self.repeat, task),
        )
        return {**incident, "remarks": remarks}

    def _guilty_row(self, trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any] | None:
        """The row without which there is no spike, in a step of one micro-batch."""
        if len(self._batches) != 1 or trainer.world_size > 1:
            return None
        entry = self._batches[0]
        total = num_rows(entry["batch"])
        if total is None:
            return None

        def norm_of(rows: Sequence[int]) -> float:
            some = {**entry, "batch": with_rows(entry["batch"], rows, total)}
            precision = trainer.precision_plugin.train_step_context
            for parameter in task.parameters():
                parameter.grad = None
            loss = rerun_loss(task, some, precision, accumulate=1)()
            if loss is None:
                return math.nan
            loss.backward()
            gradients = [p.grad for p in task.parameters() if p.grad is not None]
            return float(torch.nn.utils.get_total_norm(gradients))

        try:
            with undisturbed(task):
                return guilty_row(total, norm_of)
        # A training step need not accept other numbers of rows.
        except Exception:
            return None

    def _drift(self, finding: Finding | None) -> float | None:
        """Change of the mean bias per step of the finding's router, over the last steps."""
        if finding is None or len(self.ring) < 2:
            return None
        key = f"bias_mean/{finding.module}"
        series = [(e["step"], e[key]) for e in self.ring if key in e]
        if len(series) < 2:
            return None
        (first, start), (last, end) = series[max(0, len(series) - 32)], series[-1]
        return (end - start) / (last - first)

    def _state(self, trainer: pl.Trainer, task: pl.LightningModule) -> dict[str, Any]:
        """What is needed to run the step again."""
        return {
            **self.extras,
            "state_dict": task.state_dict(),
            "batches": [{**e, "batch": with_plain_values(e["batch"])} for e in self._batches],
            "precision": str(trainer.precision_plugin.precision),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "device": trainer.strategy.root_device.type,
            # Values that a remedy may have set during the run.
            "router_values": {
                path: {
                    field: getattr(router, field) for field in OVERRIDABLE if hasattr(router, field)
                }
                for path, router in self._routers
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """What has been recorded, and the metrics of the last steps."""
        return {
            "incident": None if self.incident is None else json_safe(self.incident),
            "spike_step": self.spike_step,
            "ring": list(self.ring),
            "latest": dict(self.latest),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.incident, self.spike_step = state_dict["incident"], state_dict["spike_step"]
        self.ring = deque(state_dict["ring"], maxlen=RING)
        self.latest = dict(state_dict["latest"])


def _first_rank_with_finding(trainer: pl.Trainer, has_finding: bool) -> int:
    """The lowest rank with a finding; 0 if no rank has one."""
    if trainer.world_size == 1:
        return 0
    answers: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(answers, has_finding)
    return answers.index(True) if True in answers else 0


def _scales_loss(trainer: pl.Trainer) -> bool:
    """Whether a GradScaler scales the loss; it finds its factor by letting gradients overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _router_means(routers: Routers) -> dict[str, float]:
    """The mean bias of each router that has biases."""
    biases = {path: getattr(router, "bias_E", None) for path, router in routers}
    known = {path: bias.detach().mean() for path, bias in biases.items() if bias is not None}
    if not known:
        return {}
    values = torch.stack(tuple(known.values())).tolist()
    return {f"bias_mean/{path}": v for path, v in zip(known, values, strict=True)}


def _grad_norm(trainer: pl.Trainer) -> float:
    """The gradient norm that the guard computed."""
    guard = StepGuard.of(trainer)
    assert guard is not None
    assert guard.grad_norm is not None
    return guard.grad_norm.item()
