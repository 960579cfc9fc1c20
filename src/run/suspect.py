"""A saved state made ready to be run again: a module with its weights, a batch, a precision."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from src.config import compose
from src.data import TrainBatches
from src.data.tokenizer import restore_tokenizer
from src.errors import InputError
from src.foreign import call
from src.model.kinds import EXTERNAL
from src.restore import empty_model, parts_of
from src.saved import checkpoint_of, read_tensors
from src.training.loss import cross_entropy

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

STATE = "state.pt"
"""What an incident's folder holds."""


class PlainStep(nn.Module):
    """The training step of a model that maps token ids to logits: cross-entropy and its own terms.

    The model's names are those that it has in a training task of ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch of inputs and targets, (B, T) each."""
        tokens_BT, targets_BT = batch
        logits_BTV = self.model(tokens_BT)
        extra: Mapping[str, Tensor] = getattr(self.model, "extra_losses", dict)()
        loss = cross_entropy(logits_BTV, targets_BT).mean()
        return torch.stack((loss, *extra.values())).sum()


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """What is examined."""

    task: nn.Module
    """With the saved weights, in training mode; has a training_step."""
    saved: Mapping[str, Any]
    """The whole content of the file."""
    target: str | None
    """What built the module; None: we did."""
    note: str | None
    """What of the file was left out."""

    @property
    def is_run(self) -> bool:
        """Whether the file is of a run of this project."""
        return _is_ours(self.saved)

    @property
    def is_incident(self) -> bool:
        """Whether the recorder wrote the file, with the batches of the step."""
        return {"incident", "batches", "precision", "router_values"} <= set(self.saved)

    @property
    def recorded(self) -> Mapping[str, Any] | None:
        """The finding of the incident; None where there is none, or where all was finite then."""
        return self.saved["incident"]["finding"] if self.is_incident else None

    @property
    def seq_len(self) -> int | None:
        """The longest sequence, in tokens; None: unknown."""
        return int(self.saved["config"]["recipe"]["seq_len"]) if self.is_run else None

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the run's tokenizer; None: unknown."""
        known = self.saved.get("tokenizer") if self.is_run else None
        return None if known is None else restore_tokenizer(known).vocab_size

    def second_moments(self) -> list[Tensor]:
        """Those of the optimizer, where the file holds it."""
        optimizers = self.saved.get("optimizer_states")
        return [moment for name, moment in _named(optimizers) if name == "exp_avg_sq"]


def read_suspect(place: Path, *, target: str | None, kwargs: dict[str, Any] | None) -> Suspect:
    """Reads a state, and puts it into a model.

    Args:
        place: an incident's folder, a run folder, or a file.
        target: what builds the model; None: it is one of ours.
        kwargs: of the target; None: those of the run, or none.

    Raises:
        InputError: there is no such state, or no model that it fits.
    """
    saved = _read(place)
    config = saved["config"] if _is_ours(saved) else None
    ours = config is not None and config["kinds"]["attention"] != EXTERNAL
    if ours and target is not None:
        raise InputError(f"target={target}: checkpoint={place} has a model of ours; leave it out")
    if target is None:
        if not ours:
            whose = "" if config is None else f", which its run had as {config['model']['target']}"
            raise InputError(
                f"target=null: checkpoint={place} has no model of ours{whose};"
                " target=package.module:callable names what builds it"
            )
        module: nn.Module = empty_model(parts_of(saved))
    else:
        known = Suspect(task=nn.Module(), saved=saved, target=target, note=None)
        if kwargs is None:
            kwargs = {} if config is None else config["model"]["kwargs"]
        module = call(
            target, kwargs, field="target", vocab_size=known.vocab_size, max_seq_len=known.seq_len
        )
    note = _load(module, saved, place=place)
    task = module if hasattr(module, "training_step") else PlainStep(module)
    suspect = Suspect(task=task.train(), saved=saved, target=target, note=note)
    if suspect.is_incident:
        _set_router_values(task, saved["router_values"])
    _stand_at(task, suspect)
    return suspect


def _is_ours(saved: Mapping[str, Any]) -> bool:
    """Whether a file has what every checkpoint and every incident of this project has."""
    config = saved.get("config")
    return isinstance(config, dict) and {"kinds", "model", "recipe", "arguments"} <= set(config)


def _named(tree: Any) -> Iterator[tuple[Any, Tensor]]:
    """All tensors in nested containers, each with the last key that leads to it."""
    if not isinstance(tree, Mapping | list | tuple):
        return
    for name, inner in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(inner, Tensor):
            yield name, inner
        else:
            yield from _named(inner)


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


def _load(module: nn.Module, saved: Mapping[str, Any], *, place: Path) -> str | None:
    """Puts weights into a module, under the one prefix by which all of its names are found.

    They are the file's `state_dict`, the file itself, or any other table in it.

    Raises:
        InputError: there is no such prefix, or a shape differs.
    """
    own = module.state_dict()
    tables = [saved["state_dict"]] if "state_dict" in saved else [saved, *saved.values()]
    found = next((f for f in (_fitting(table, own) for table in tables) if f is not None), None)
    if found is None:
        names = {name for name, _ in _named(saved)}
        missing = next((name for name in own if name not in names), next(iter(own)))
        raise InputError(f"checkpoint={place}: does not fit the model: has no {missing}")
    prefix, tensors = found
    for name, value in own.items():
        shape = tuple(tensors[prefix + name].shape)
        if shape != tuple(value.shape):
            raise InputError(
                f"checkpoint={place}: does not fit the model: {prefix + name} is {shape},"
                f" must be {tuple(value.shape)}"
            )
    module.load_state_dict({name: tensors[prefix + name] for name in own})
    left = len(tensors) - len(own)
    return f"{left} tensors of the checkpoint are none of the model's" if left else None


def _fitting(table: Any, own: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]] | None:
    """The tensors of a table, and the prefix by which all names of a module are found there."""
    if not isinstance(table, Mapping):
        return None
    tensors = {
        name: value
        for name, value in table.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    first = next(iter(own), "")
    prefixes = sorted({n.removesuffix(first) for n in tensors if n.endswith(first)}, key=len)
    prefix = next((p for p in prefixes if all(p + name in tensors for name in own)), None)
    return None if prefix is None else (prefix, tensors)


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
        return [_entry(_from_file(suspect, batch))]
    if suspect.is_incident:
        return list(suspect.saved["batches"])
    if not suspect.is_run:
        raise InputError("batch=null: must be a file: .npy or .pt of token ids, or a text")
    try:
        config = compose("train", suspect.saved["config"]["arguments"])
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


def _entry(batch: Any) -> dict[str, Any]:
    rng = torch.get_rng_state()
    return {"batch": batch, "batch_idx": 0, "rng": rng, "cuda_rng": None, "router_state": {}}


def _from_file(suspect: Suspect, file: Path) -> Any:
    if not file.is_file():
        raise InputError(f"batch={file}: no such file")
    if file.suffix == ".pt":
        try:
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
