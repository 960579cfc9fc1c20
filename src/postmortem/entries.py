"""The batches of a step that is rerun: those of an incident, the run's next ones, or a file's."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from src.common.errors import InputError, reading
from src.common.override_grammar import TARGET, file_arguments
from src.common.read_checkpoint import check_sums
from src.config.compose import compose
from src.data import TrainBatches
from src.data.tokenizer import restore_tokenizer
from src.postmortem.load import TRUE_PRECISIONS, LossStep, SavedState, plugin_for

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


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
        corpus.train,
        seed=config.seed,
        batch_size=recipe.batch_size,
        seq_len=recipe.seq_len,
        accumulate=recipe.accumulate,
        poison=config.poison,
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
    if file.suffix in (".pt", ".npy"):
        content = content_of(file)
        if file.suffix == ".pt" and not isinstance(state.task, LossStep):
            return content
    else:
        content = _tokens_of_text(state, file)
    return _pair(state, content, file)


def content_of(file: Path) -> Any:
    """What a .pt or .npy file holds; no code in it is run.

    Raises:
        InputError: there is no such file, it is damaged, or the array holds no integers.
    """
    if file.is_dir():
        raise InputError(f"batch={file}: is a folder, must be a file")
    if not file.is_file():
        raise InputError(f"batch={file}: no such file")
    if file.suffix == ".pt":
        try:
            # Files of old torch versions are not zip archives, and have no checksums.
            if zipfile.is_zipfile(file):
                check_sums(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a user's file may fail in any way
            raise InputError(f"batch={file}: is damaged, or not a file of tensors") from error
    try:
        with file.open("rb") as handle:
            array = np.lib.format.read_array(handle, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"batch={file}: is damaged, or not an array of numbers") from error
    if array.dtype.kind not in "iu":
        raise InputError(f"batch={file}: has entries of {array.dtype}; must be integers")
    return torch.from_numpy(array.astype(np.int64))


def _tokens_of_text(state: SavedState, file: Path) -> Tensor:
    """The token ids of a text as one row, (1, T), cut to the model's context."""
    if file.is_dir() or not file.is_file():
        raise InputError(
            f"batch={file}: {'is a folder, must be a file' if file.is_dir() else 'no such file'}"
        )
    if state.vocab_size is None:
        raise InputError(
            f"batch={file}: the checkpoint has no tokenizer for a text, as those of this project"
            " have; type a .npy file"
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
