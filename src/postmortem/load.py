"""Loads a saved state to rerun a step: a module with its weights, batches, and a precision."""

import zipfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nonfinite.lightning.rerun_step import AUTOCAST, autocast_for
from src.checkpoint.match_names import load_weights, named_tensors
from src.checkpoint.rebuild import empty_model, parts_of
from src.checkpoint.validate import STATE, check_state, is_external, is_incident, is_run
from src.common.errors import InputError, reading
from src.common.override_grammar import TARGET, file_arguments
from src.common.read_checkpoint import check_sums, checkpoint_of, read_tensors
from src.config.compose import compose
from src.data import TrainBatches
from src.data.tokenizer import restore_tokenizer
from src.external.load_target import call
from src.training.loss import losses

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

TRUE_PRECISIONS: dict[str, Callable[[], Precision]] = {
    "64-true": DoublePrecision,
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "16-true": lambda: HalfPrecision("16-true"),
}
"""Precisions in which weights and batches have another dtype than float32."""

PRECISIONS = (*AUTOCAST, *TRUE_PRECISIONS)
"""Precisions in which a step can be rerun, by Lightning's names."""


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
        vocab_size=_vocab_size(saved),
        max_seq_len=_seq_len(saved),
    )


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
    if (place / STATE).is_file():
        return read_tensors(place / STATE, field="checkpoint")
    if place.suffix == ".safetensors" and place.is_file():
        try:
            return dict(load_file(place))
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint={place}: is damaged ({error})") from error
    return read_tensors(checkpoint_of(place, field="checkpoint"), field="checkpoint")


def _set_router_values(task: nn.Module, values: Mapping[str, Mapping[str, Any]]) -> None:
    """Restores the values that a remedy had set on routers when the incident was recorded."""
    known = dict(task.named_modules())
    for path, fields in values.items():
        router = known.get(path)
        for field, value in fields.items() if router is not None else ():
            setattr(router, field, value)


def entries_for(state: SavedState, batch: Path | None) -> list[dict[str, Any]]:
    """The batches of the step, in the form in which an incident keeps them.

    Args:
        state: the saved state.
        batch: a file; None: the incident's own batches, or the run's next ones.

    Raises:
        InputError: there is no batch, or it does not fit the model.
    """
    if batch is not None:
        content = plugin_for(state.precision).convert_input(_from_file(state, batch))
        return [_entry(content)]
    if state.is_incident:
        return [
            {**entry, "batch": _in_precision(state, entry["batch"])}
            for entry in state.saved["batches"]
        ]
    if not state.is_run:
        raise InputError("batch=null: must be a file with token ids (.npy or .pt) or text")
    try:
        config = compose("train", _arguments(state))
        corpus = config.data.load(
            config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
        )
    except InputError as error:
        raise InputError(f"batch=null: the run's own data cannot be loaded ({error})") from error
    recipe = config.recipe
    batches = TrainBatches(
        corpus.train, seed=config.seed, batch_size=recipe.batch_size, seq_len=recipe.seq_len
    )
    first = state.saved["global_step"] * recipe.accumulate
    return [_entry(batches.batch(first + index)) for index in range(recipe.accumulate)]


def _arguments(state: SavedState) -> list[str]:
    """The run's arguments, to load its data; a target that the user typed replaces the run's."""
    taken = file_arguments(
        state.saved["config"]["arguments"],
        where="the checkpoint",
        is_dropped=lambda key: key == TARGET and state.target is not None,
    )
    return taken if state.target is None else [*taken, f"{TARGET}={state.target}"]


def _entry(batch: Any) -> dict[str, Any]:
    rng = torch.get_rng_state()
    return {"batch": batch, "batch_idx": 0, "rng": rng, "cuda_rng": None, "router_state": {}}


def _in_precision(state: SavedState, batch: Any) -> Any:
    """A recorded batch, converted from the recorded precision to the requested one."""
    if state.saved["precision"] in TRUE_PRECISIONS and state.precision not in TRUE_PRECISIONS:
        return apply_to_collection(
            batch, Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )
    return plugin_for(state.precision).convert_input(batch)


def _from_file(state: SavedState, file: Path) -> Any:
    if file.is_dir():
        raise InputError(f"batch={file}: is a folder, must be a file")
    if not file.is_file():
        raise InputError(f"batch={file}: no such file")
    if file.suffix == ".pt":
        try:
            # Files of old torch versions are not zip archives, and have no checksums.
            if zipfile.is_zipfile(file):
                check_sums(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a user's file may fail in any way
            raise InputError(f"batch={file}: is damaged, or not a file of tensors") from error
        if not isinstance(state.task, LossStep):
            return content
    elif file.suffix == ".npy":
        try:
            with file.open("rb") as handle:
                array = np.lib.format.read_array(handle, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"batch={file}: is damaged, or not an array of numbers") from error
        if array.dtype.kind not in "iu":
            raise InputError(f"batch={file}: has entries of {array.dtype}; must be integers")
        content = torch.from_numpy(array.astype(np.int64))
    else:
        content = _tokens_of_text(state, file)
    return _pair(state, content, file)


def _tokens_of_text(state: SavedState, file: Path) -> Tensor:
    """The token ids of a text as one row, (1, T), cut to the model's context."""
    if state.vocab_size is None:
        raise InputError(
            f"batch={file}: the checkpoint has no tokenizer for a text; type a .npy file"
        )
    try:
        with reading(f"batch={file}"):
            text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"batch={file}: is not UTF-8") from error
    try:
        ids = restore_tokenizer(state.saved["tokenizer"]).encode(text).astype(np.int64)
    except InputError as error:
        raise InputError(f"batch={file}: {error}") from error
    limit = None if state.seq_len is None else state.seq_len + 1
    return torch.from_numpy(ids[None, :limit])


def _pair(state: SavedState, content: Any, file: Path) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each, from two tensors or from one of consecutive tokens."""
    is_pair = isinstance(content, list | tuple) and len(content) == 2
    tensors = list(content) if is_pair else [content]
    for tensor in tensors:
        is_integers = isinstance(tensor, Tensor) and tensor.dtype in INTEGERS
        if not is_integers or tensor.dim() != 2 or tensor.layout != torch.strided:
            raise InputError(
                f"batch={file}: must hold integers of shape (rows, time), or two such tensors"
            )
    inputs, targets = tensors if is_pair else (content[:, :-1], content[:, 1:])
    if inputs.shape != targets.shape or not inputs.numel():
        raise InputError(
            f"batch={file}: must have at least two tokens per row, and as many targets as inputs"
        )
    if state.seq_len is not None and inputs.shape[1] > state.seq_len:
        raise InputError(
            f"batch={file}: has {inputs.shape[1]} tokens per row; must have at most {state.seq_len}"
        )
    known = state.vocab_size
    both = torch.cat((inputs.flatten(), targets.flatten()))
    if known is not None and not 0 <= int(both.min()) <= int(both.max()) < known:
        raise InputError(f"batch={file}: token ids must be from 0 to {known - 1}")
    # As in training, the clone keeps a model that writes into its input from changing targets.
    return inputs.long(), targets.long().clone()
