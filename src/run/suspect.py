"""A saved state made ready to be run again: a module with its weights, a batch, a precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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

STATE = "state.pt"
"""What an incident's folder holds."""


class PlainStep(nn.Module):
    """The training step of a model that maps token ids to logits: cross-entropy.

    The model's names are those that it has in a training task of ours.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch of inputs and targets, (B, T) each."""
        tokens_BT, targets_BT = batch
        logits_BTV = self.model(tokens_BT)
        return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


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
        return isinstance(self.saved.get("config"), dict)

    @property
    def is_incident(self) -> bool:
        """Whether the recorder wrote the file, with the batches of the step."""
        return isinstance(self.saved.get("incident"), dict)

    @property
    def seq_len(self) -> int | None:
        """The longest sequence, in tokens; None: unknown."""
        return int(self.saved["config"]["recipe"]["seq_len"]) if self.is_run else None

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the run's tokenizer; None: unknown."""
        known = self.saved.get("tokenizer")
        return None if known is None else restore_tokenizer(known).vocab_size

    def second_moments(self) -> list[Tensor]:
        """Those of the optimizer, where the file holds it."""
        states = self.saved.get("optimizer_states") or []
        entries = [entry for state in states for entry in state.get("state", {}).values()]
        return [entry["exp_avg_sq"] for entry in entries if "exp_avg_sq" in entry]


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
    config = saved.get("config") if isinstance(saved.get("config"), dict) else None
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
    weights = saved.get("state_dict", saved)
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise InputError(f"checkpoint={place}: state_dict is a {kind}, must be tensors by name")
    note = _load(module, weights, place=place)
    task = module if hasattr(module, "training_step") else PlainStep(module)
    _set_router_values(task, saved.get("router_values", {}))
    return Suspect(task=task.train(), saved=saved, target=target, note=note)


def _read(place: Path) -> dict[str, Any]:
    if (place / STATE).is_file():
        return read_tensors(place / STATE, field="checkpoint")
    if place.suffix == ".safetensors" and place.is_file():
        try:
            return dict(load_file(place))
        except (SafetensorError, OSError) as error:
            raise InputError(f"checkpoint={place}: is damaged ({error})") from error
    return read_tensors(checkpoint_of(place, field="checkpoint"), field="checkpoint")


def _load(module: nn.Module, weights: Mapping[str, Any], *, place: Path) -> str | None:
    """Puts weights into a module, under the one prefix by which all of its names are found.

    Raises:
        InputError: there is no such prefix, or a shape differs.
    """
    own = module.state_dict()
    tensors = {
        name: value
        for name, value in weights.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    first = next(iter(own), "")
    prefixes = sorted({n.removesuffix(first) for n in tensors if n.endswith(first)}, key=len)
    prefix = next((p for p in prefixes if all(p + name in tensors for name in own)), None)
    if prefix is None:
        missing = next(name for name in own if name not in tensors)
        raise InputError(f"checkpoint={place}: does not fit the model: has no {missing}")
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
    if suspect.saved.get("tokenizer") is None:
        raise InputError(f"batch={file}: a text needs a checkpoint with a tokenizer; give .npy")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"batch={file}: is not UTF-8") from error
    ids = restore_tokenizer(suspect.saved["tokenizer"]).encode(text).astype(np.int64)
    limit = None if suspect.seq_len is None else suspect.seq_len + 1
    return torch.from_numpy(ids[None, :limit])


def _pair(suspect: Suspect, content: Any, file: Path) -> tuple[Tensor, Tensor]:
    """Inputs and targets: two tensors, or one whose tokens are predicted from those before."""
    is_pair = isinstance(content, list | tuple) and len(content) == 2
    tensors = list(content) if is_pair else [content]
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.is_floating_point():
            raise InputError(f"batch={file}: must be integers of shape (rows, time), or two such")
    inputs, targets = tensors if is_pair else (content[:, :-1], content[:, 1:])
    if inputs.shape != targets.shape or not inputs.numel():
        raise InputError(f"batch={file}: must have at least two tokens a row, targets as inputs")
    if suspect.seq_len is not None and inputs.shape[1] > suspect.seq_len:
        raise InputError(
            f"batch={file}: has {inputs.shape[1]} tokens a row, must be at most {suspect.seq_len}"
        )
    known = suspect.vocab_size
    if known is not None and not 0 <= int(inputs.min()) <= int(inputs.max()) < known:
        raise InputError(f"batch={file}: token ids must be from 0 to {known - 1}")
    return inputs.long(), targets.long()
