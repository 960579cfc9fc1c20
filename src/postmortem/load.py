"""Loads a saved state to rerun a step: a module with its weights, batches, and a precision."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nonfinite.lightning.rerun_step import AUTOCAST, autocast_for
from src.checkpoint.match_names import load_weights, named_tensors
from src.checkpoint.rebuild import empty_model, parts_of
from src.checkpoint.validate import check_state, is_external, is_incident, is_run
from src.common.errors import InputError
from src.common.read_checkpoint import read_tensors
from src.data.tokenizer import restore_tokenizer
from src.external.load_target import call
from src.postmortem.given import PRECISIONS, saved_file
from src.training.loss import losses

TRUE_PRECISIONS: dict[str, Callable[[], Precision]] = {
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
}
"""Precisions in which weights and batches have another dtype than float32."""

SETTINGS = ("hyper_parameters", "model_args", "config")
"""Where checkpoints hold a model's arguments: those of Lightning, of nanoGPT, and many others."""


def plugin_for(precision: str) -> Precision:
    """Lightning's plugin that converts a module and a batch to a precision."""
    return TRUE_PRECISIONS.get(precision, Precision)()


def context_for(precision: str) -> AbstractContextManager[Any]:
    """The context of a training step in a precision."""
    if precision in AUTOCAST:
        return autocast_for(precision)
    return plugin_for(precision).forward_context()


class LossStep(nn.Module):
    """The training step of a language model: cross-entropy, z-loss and the model's own losses.

    Its parameters have the same names as in LanguageModelTask.

    Args:
        model: the built-in model or an external one.
        z_loss_weight: as in the run's recipe.
    """

    def __init__(self, model: nn.Module, *, z_loss_weight: float) -> None:
        super().__init__()
        self.model, self.z_loss_weight = model, z_loss_weight

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of inputs and targets, (B, T) each."""
        tokens_BT, targets_BT = batch
        found = losses(self.model, tokens_BT, targets_BT, z_loss_weight=self.z_loss_weight)
        found |= getattr(self.model, "extra_losses", dict)()
        return torch.stack(tuple(found.values())).sum()


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A saved state that is examined."""

    task: nn.Module
    """A module with the saved weights, in training mode; has a training_step."""
    saved: Mapping[str, Any]
    """The whole content of the file."""
    target: str | None
    """The target that built the module; None for a built-in model."""
    precision: str
    """The precision of the step, one of PRECISIONS."""
    note: str | None
    """A sentence about tensors in the file that were not used; None if all were."""

    @property
    def is_run(self) -> bool:
        """Whether a run of this project wrote the file."""
        return is_run(self.saved)

    @property
    def is_incident(self) -> bool:
        """Whether the recorder wrote the file, with the batches of the step."""
        return is_incident(self.saved)

    @property
    def recorded(self) -> Mapping[str, Any] | None:
        """The incident's finding; None if there is no incident, or if its rerun was finite."""
        return self.saved["incident"]["finding"] if self.is_incident else None

    @property
    def seq_len(self) -> int | None:
        """The longest sequence, in tokens; None if unknown."""
        return _seq_len(self.saved)

    @property
    def vocab_size(self) -> int | None:
        """Vocabulary size of the run's tokenizer; None if unknown."""
        return _vocab_size(self.saved)

    def own_path(self, path: str) -> str:
        """The path of a module as the user's model has it, without the step around it.

        Runs of this project keep the step in their paths, as their incidents do.
        """
        if not isinstance(self.task, LossStep) or self.is_run:
            return path
        return "" if path == "model" else path.removeprefix("model.")

    def second_moments(self) -> list[Tensor]:
        """AdamW's second moments; empty if the file does not hold the optimizer's state."""
        optimizers = self.saved.get("optimizer_states")
        return [moment for name, moment in named_tensors(optimizers) if name == "exp_avg_sq"]


def read_state(
    place: Path, *, target: str | None, kwargs: dict[str, Any] | None, precision: str | None
) -> SavedState:
    """Reads a saved state and loads it into a module.

    Args:
        place: an incident's folder, a run folder, or a file.
        target: package.module:callable that builds the model; None for a built-in model.
        kwargs: keyword arguments of the target; None: those of the run, or none.
        precision: one of PRECISIONS; None: that of the incident or the run.

    Raises:
        InputError: there is no such state, it is damaged, or it does not fit the model.
    """
    saved = _read(place)
    check_state(saved, what=f"checkpoint={place}")
    precision = precision or _precision_of(saved)
    if is_run(saved) and not is_external(saved) and target is not None:
        raise InputError(
            f"target={target}: checkpoint={place} has a built-in model; leave target out"
        )
    if target is None:
        module: nn.Module = _built_in_model(saved, place)
    else:
        module = _external_model(saved, target, kwargs)
    module = plugin_for(precision).convert_module(module)
    note = load_weights(module, saved, place=place)
    # A run of this project never calls its model's own training_step.
    if hasattr(module, "training_step") and not is_run(saved):
        task = module
    else:
        z_loss_weight = saved["config"]["recipe"]["z_loss_weight"] if is_run(saved) else 0.0
        task = LossStep(module, z_loss_weight=z_loss_weight)
    state = SavedState(
        task=task.train(), saved=saved, target=target, precision=precision, note=note
    )
    if state.is_incident:
        _set_router_values(task, saved["router_values"])
    _set_global_step(task, state)
    return state


def _built_in_model(saved: Mapping[str, Any], place: Path) -> nn.Module:
    if is_run(saved) and not is_external(saved):
        return empty_model(parts_of(saved))
    target = saved["config"]["model"]["target"] if is_run(saved) else "package.module:callable"
    raise InputError(f"target=null: checkpoint={place} has no built-in model; type target={target}")


def _external_model(
    saved: Mapping[str, Any], target: str, kwargs: dict[str, Any] | None
) -> nn.Module:
    if kwargs is None:
        kwargs = saved["config"]["model"]["kwargs"] if is_run(saved) else {}
    return call(
        target,
        kwargs,
        field="target",
        vocab_size=_vocab_size(saved) or _saved_size(saved, "vocab_size"),
        max_seq_len=_seq_len(saved) or _saved_size(saved, "max_seq_len"),
    )


def _saved_size(saved: Mapping[str, Any], name: str) -> int | None:
    """A size in the settings that people save beside their weights; None if it is not there."""
    for section in SETTINGS:
        settings = saved.get(section)
        value = settings.get(name) if isinstance(settings, Mapping) else None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _seq_len(saved: Mapping[str, Any]) -> int | None:
    return int(saved["config"]["recipe"]["seq_len"]) if is_run(saved) else None


def _vocab_size(saved: Mapping[str, Any]) -> int | None:
    return restore_tokenizer(saved["tokenizer"]).vocab_size if is_run(saved) else None


def _precision_of(saved: Mapping[str, Any]) -> str:
    """The precision of the incident or the run; 32-true for other states, which do not say."""
    if is_incident(saved):
        precision = str(saved["precision"])
    elif is_run(saved):
        precision = str(saved["config"]["recipe"]["precision"])
    else:
        precision = "32-true"
    if precision not in PRECISIONS:
        raise InputError(
            f"precision=null: the step was recorded in {precision}; type one of"
            f" {', '.join(PRECISIONS)}"
        )
    return precision


def _set_global_step(task: nn.Module, state: SavedState) -> None:
    """Sets `global_step` of a LightningModule without a trainer, because its code may read it."""
    step = state.saved.get("global_step")
    if state.is_incident:
        step = state.saved["incident"]["step"] - 1
    if isinstance(task, pl.LightningModule) and isinstance(step, int):
        kind = type(task)
        task.__class__ = type(kind.__name__, (kind,), {"global_step": step})


def _read(place: Path) -> dict[str, Any]:
    place = saved_file(place)
    if place.suffix == ".safetensors" and place.is_file():
        try:
            return dict(load_file(place))
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint={place}: is damaged ({error})") from error
    saved = read_tensors(place, field="checkpoint")
    if {"calls", "incident"} <= saved.keys():
        raise InputError(
            f"checkpoint={place}: was written by watch(); type python -m nonfinite {place.parent}"
            " --model package.module:callable"
        )
    return saved


def _set_router_values(task: nn.Module, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Restores the values that a remedy had set on routers when the incident was recorded."""
    known = dict(task.named_modules())
    for path, fields in values.items():
        router = known.get(path)
        for field, value in fields.items() if router is not None else ():
            setattr(router, field, value)
