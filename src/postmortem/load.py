"""A saved state made ready to be run again: a module with its weights, a batch, a precision."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from src.checkpoint.match_names import load_weights, named_tensors
from src.checkpoint.rebuild import empty_model, parts_of
from src.checkpoint.validate import STATE, check_state, is_external, is_incident, is_run
from src.common.errors import InputError, reading
from src.common.override_grammar import TARGET, out_of_file
from src.common.read_checkpoint import check_sums, checkpoint_of, read_tensors
from src.config.compose import compose
from src.data import TrainBatches
from src.data.tokenizer import restore_tokenizer
from src.external.load_target import call
from src.postmortem.precision import PRECISIONS, WHOLE, plugin_for
from src.training.loss import losses

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PlainStep(nn.Module):
    """The training step of a model that maps token ids to logits: cross-entropy and its own terms.

    The model's names are those that it has in a training task of ours.

    Args:
        model: ours or somebody else's.
        z_loss_weight: of the run's recipe.
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
class Suspect:
    """What is examined."""

    task: nn.Module
    """With the saved weights, in training mode; has a training_step."""
    saved: Mapping[str, Any]
    """The whole content of the file."""
    target: str | None
    """What built the module; None: we did."""
    precision: str
    """In which the step is run, one of PRECISIONS."""
    note: str | None
    """What of the file was left out."""

    @property
    def is_run(self) -> bool:
        """Whether the file is of a run of this project."""
        return is_run(self.saved)

    @property
    def is_incident(self) -> bool:
        """Whether the recorder wrote the file, with the batches of the step."""
        return is_incident(self.saved)

    @property
    def recorded(self) -> Mapping[str, Any] | None:
        """The finding of the incident; None where there is none, or where all was finite then."""
        return self.saved["incident"]["finding"] if self.is_incident else None

    @property
    def seq_len(self) -> int | None:
        """The longest sequence, in tokens; None: unknown."""
        return _seq_len(self.saved)

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the run's tokenizer; None: unknown."""
        return _vocab_size(self.saved)

    def second_moments(self) -> list[Tensor]:
        """Those of the optimizer, where the file holds it."""
        optimizers = self.saved.get("optimizer_states")
        return [moment for name, moment in named_tensors(optimizers) if name == "exp_avg_sq"]


def read_suspect(
    place: Path, *, target: str | None, kwargs: dict[str, Any] | None, precision: str | None
) -> Suspect:
    """Reads a state, and puts it into a model.

    Args:
        place: an incident's folder, a run folder, or a file.
        target: what builds the model; None: it is one of ours.
        kwargs: of the target; None: those of the run, or none.
        precision: one of PRECISIONS; None: that of the incident or the run.

    Raises:
        InputError: there is no such state, it is damaged, or no model that it fits.
    """
    saved = _read(place)
    check_state(saved, what=f"checkpoint={place}")
    precision = precision or _precision_of(saved)
    if is_run(saved) and not is_external(saved) and target is not None:
        raise InputError(f"target={target}: checkpoint={place} has a model of ours; leave it out")
    if target is None:
        module: nn.Module = _own_model(saved, place)
    else:
        module = _foreign_model(saved, target, kwargs)
    module = plugin_for(precision).convert_module(module)
    note = load_weights(module, saved, place=place)
    # Runs of ours never call a training_step of their model's.
    if hasattr(module, "training_step") and not is_run(saved):
        task = module
    else:
        z_loss_weight = saved["config"]["recipe"]["z_loss_weight"] if is_run(saved) else 0.0
        task = PlainStep(module, z_loss_weight=z_loss_weight)
    suspect = Suspect(task=task.train(), saved=saved, target=target, precision=precision, note=note)
    if suspect.is_incident:
        _set_router_values(task, saved["router_values"])
    _stand_at(task, suspect)
    return suspect


def _own_model(saved: Mapping[str, Any], place: Path) -> nn.Module:
    if is_run(saved) and not is_external(saved):
        return empty_model(parts_of(saved))
    whose = ""
    if is_run(saved):
        whose = f", which its run had as {saved['config']['model']['target']}"
    raise InputError(
        f"target=null: checkpoint={place} has no model of ours{whose};"
        " target=package.module:callable names what builds it"
    )


def _foreign_model(
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
    """That of the incident or the run; of other states nobody knows it."""
    if is_incident(saved):
        precision = str(saved["precision"])
    elif is_run(saved):
        precision = str(saved["config"]["recipe"]["precision"])
    else:
        precision = "32-true"
    if precision not in PRECISIONS:
        raise InputError(
            f"precision=null: {precision}, in which the step was recorded, is none of"
            f" {', '.join(PRECISIONS)}; name one of them"
        )
    return precision


def _stand_at(task: nn.Module, suspect: Suspect) -> None:
    """Lets a LightningModule without a trainer know the step, which its code may ask for."""
    step = suspect.saved.get("global_step")
    if suspect.is_incident:
        step = suspect.saved["incident"]["step"] - 1
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
    """What an option had set on routers when an incident was recorded."""
    known = dict(task.named_modules())
    for path, fields in values.items():
        router = known.get(path)
        for field, value in fields.items() if router is not None else ():
            setattr(router, field, value)


def entries_for(suspect: Suspect, batch: Path | None) -> list[dict[str, Any]]:
    """The batches that the step is run on, as an incident keeps them.

    Args:
        suspect: the state.
        batch: a file; None: the incident's own batches, or the one that the run would take next.

    Raises:
        InputError: there is none, or it is no batch of this model.
    """
    if batch is not None:
        content = plugin_for(suspect.precision).convert_input(_from_file(suspect, batch))
        return [_entry(content)]
    if suspect.is_incident:
        return [
            {**entry, "batch": _in_type(suspect, entry["batch"])}
            for entry in suspect.saved["batches"]
        ]
    if not suspect.is_run:
        raise InputError("batch=null: must be a file: .npy or .pt of token ids, or a text")
    try:
        config = compose("train", _arguments(suspect))
        corpus = config.data.load(
            config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
        )
    except InputError as error:
        raise InputError(f"batch=null: the run's own data are not to be had ({error})") from error
    recipe = config.recipe
    batches = TrainBatches(
        corpus.train, seed=config.seed, batch_size=recipe.batch_size, seq_len=recipe.seq_len
    )
    first = suspect.saved["global_step"] * recipe.accumulate
    return [_entry(batches.batch(first + index)) for index in range(recipe.accumulate)]


def _arguments(suspect: Suspect) -> list[str]:
    """Those of the run, for its data; what builds the model is as it was typed here."""
    taken = out_of_file(
        suspect.saved["config"]["arguments"],
        where="the checkpoint",
        left_out=lambda key: key == TARGET and suspect.target is not None,
    )
    return taken if suspect.target is None else [*taken, f"{TARGET}={suspect.target}"]


def _entry(batch: Any) -> dict[str, Any]:
    rng = torch.get_rng_state()
    return {"batch": batch, "batch_idx": 0, "rng": rng, "cuda_rng": None, "router_state": {}}


def _in_type(suspect: Suspect, batch: Any) -> Any:
    """A recorded batch, which Lightning had brought to the type that the weights had then."""
    if suspect.saved["precision"] in WHOLE and suspect.precision not in WHOLE:
        return apply_to_collection(
            batch, Tensor, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor
        )
    return plugin_for(suspect.precision).convert_input(batch)


def _from_file(suspect: Suspect, file: Path) -> Any:
    if file.is_dir():
        raise InputError(f"batch={file}: is a folder, must be a file")
    if not file.is_file():
        raise InputError(f"batch={file}: no such file")
    if file.suffix == ".pt":
        try:
            # Older files of torch are no archives, and have no checksums.
            if zipfile.is_zipfile(file):
                check_sums(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever the file holds
            raise InputError(f"batch={file}: is damaged, or no file of tensors") from error
        if not isinstance(suspect.task, PlainStep):
            return content
    elif file.suffix == ".npy":
        try:
            with file.open("rb") as handle:
                array = np.lib.format.read_array(handle, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"batch={file}: is damaged, or no array of numbers") from error
        if array.dtype.kind not in "iu":
            raise InputError(f"batch={file}: has entries of {array.dtype}, must be integers")
        content = torch.from_numpy(array.astype(np.int64))
    else:
        content = _tokens_of_text(suspect, file)
    return _pair(suspect, content, file)


def _tokens_of_text(suspect: Suspect, file: Path) -> Tensor:
    """A text as one row, cut to what the model can take."""
    if suspect.vocab_size is None:
        raise InputError(f"batch={file}: a text needs a checkpoint with a tokenizer; give .npy")
    try:
        with reading(f"batch={file}"):
            text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"batch={file}: is not UTF-8") from error
    try:
        ids = restore_tokenizer(suspect.saved["tokenizer"]).encode(text).astype(np.int64)
    except InputError as error:
        raise InputError(f"batch={file}: {error}") from error
    limit = None if suspect.seq_len is None else suspect.seq_len + 1
    return torch.from_numpy(ids[None, :limit])


def _pair(suspect: Suspect, content: Any, file: Path) -> tuple[Tensor, Tensor]:
    """Inputs and targets: two tensors, or one whose tokens are predicted from those before."""
    is_pair = isinstance(content, list | tuple) and len(content) == 2
    tensors = list(content) if is_pair else [content]
    for tensor in tensors:
        is_integers = isinstance(tensor, Tensor) and tensor.dtype in INTEGERS
        if not is_integers or tensor.dim() != 2 or tensor.layout != torch.strided:
            raise InputError(f"batch={file}: must be integers of shape (rows, time), or two such")
    inputs, targets = tensors if is_pair else (content[:, :-1], content[:, 1:])
    if inputs.shape != targets.shape or not inputs.numel():
        raise InputError(f"batch={file}: must have at least two tokens a row, targets as inputs")
    if suspect.seq_len is not None and inputs.shape[1] > suspect.seq_len:
        raise InputError(
            f"batch={file}: has {inputs.shape[1]} tokens a row, must be at most {suspect.seq_len}"
        )
    known = suspect.vocab_size
    both = torch.cat((inputs.flatten(), targets.flatten()))
    if known is not None and not 0 <= int(both.min()) <= int(both.max()) < known:
        raise InputError(f"batch={file}: token ids must be from 0 to {known - 1}")
    # As in training, a model that writes into its tokens leaves its targets alone.
    return inputs.long(), targets.long().clone()
