"""Predicts the peak memory of a run from its configuration and four small forward passes.

Kept activations are counted, not estimated: models with one and two blocks, at full width, run on
one and two rows, and a hook counts the bytes that autograd keeps. These bytes are linear in the
number of blocks and in the number of rows, so four counts determine them for any number.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.common.errors import InputError
from src.common.random_streams import generator
from src.config.run_config import RunConfig
from src.external.model import ExternalConfig
from src.model import Transformer
from src.model.architecture import ModelParts
from src.model.ffn.moe import MoEConfig
from src.training.loss import CHUNK, saves_memory

FLOAT32, BFLOAT16 = 4, 2

PROGRAM_BYTES = {"cpu": 510 * 2**20, "cuda": 500 * 2**20}
"""Memory in use before a model exists: Python and its libraries, or a CUDA context."""

KERNEL_BYTES = 530 * 2**20
"""The bfloat16 matmul kernels that oneDNN caches, up to the limit set in process_setup; measured at
two model sizes."""

WORKING_STATES = 4
"""Number of hidden-state tensors (B, T, D) that the backward pass of a layer holds at once."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory of a training process in bytes, on the device that holds the model.

    Counted are live tensors and loaded libraries. Not counted is what the allocator holds beyond
    them: little on a GPU; on a CPU up to 20 %, and up to 40 % for experts in bfloat16, because
    glibc's heap grows with each new number of tokens that a batch sends to an expert. Activations
    are those of the CPU's attention, which keeps its probabilities in float32; a GPU's does not.
    """

    weights: int
    gradients: int
    accumulated: int
    """Accumulated gradients of earlier micro-batches, held during the next forward pass."""
    moments: int
    """AdamW's two moments."""
    buckets: int
    """Buffers in which several devices exchange gradients."""
    averages: int
    """Averaged weights and snapshots, of remedies and observers that keep them."""
    activations: int
    """Activations kept for the backward pass, including those of the loss."""
    working: int
    """Gradients of activations and recomputed activations within the backward pass of one block."""
    validation: int
    """Logits of a validation batch; they exist while gradients and activations do not."""
    program: int
    """Libraries and their state."""
    kernels: int
    """For experts in bfloat16 on a CPU: one kernel for each number of tokens an expert may get."""

    @property
    def kept(self) -> int:
        """Bytes in use all the time."""
        programs = self.program + self.kernels
        return self.weights + self.moments + self.buckets + self.averages + programs

    @property
    def step(self) -> int:
        """Peak of a training step."""
        # The backward pass frees activations while it allocates gradients, so the larger counts.
        return self.kept + max(self.accumulated + self.activations + self.working, self.gradients)

    @property
    def peak(self) -> int:
        """Peak of the whole run."""
        return max(self.step, self.kept + self.validation)

    def plain(self) -> dict[str, Any]:
        """All values by name."""
        return {**dataclasses.asdict(self), "peak": self.peak}


TRIED_OPERATIONS = 2e13
"""Floating-point operations of the small passes above which they would take too long."""


def machine_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(config: RunConfig, *, vocab_size: int) -> None:
    """Compares a lower bound of the memory that a run needs with this machine's memory.

    Pure arithmetic, so that a run that cannot fit fails before its model is built.

    Raises:
        InputError: the model, or the hidden states that a step keeps, need more than there is.
    """
    architecture, recipe = config.architecture, config.recipe
    if not isinstance(architecture, ModelParts):
        return
    total = architecture.measure(vocab_size=vocab_size).params_total
    on_cpu = config.trainer.device_type == "cpu"
    # The model is always built on the CPU. Training there adds gradients and AdamW's two moments.
    least = total * FLOAT32 * (4 if on_cpu else 1)
    what = f"model: {total:,} parameters"
    if on_cpu and not config.trainer.activation_checkpointing:
        states = architecture.model.hidden_dim * architecture.model.num_layers * 2
        least += recipe.batch_size * recipe.seq_len * states
        what += f" and a step of {recipe.batch_size * recipe.seq_len:,} tokens"
    if least > machine_bytes():
        raise InputError(
            f"{what} need at least {least / 2**30:,.0f} GiB of memory, and this machine has"
            f" {machine_bytes() / 2**30:,.0f} GiB; reduce model.* or recipe.batch_size"
        )


def _can_be_tried(architecture: ModelParts) -> bool:
    """Whether two blocks of the model fit into this machine's memory and run within a minute."""
    two = dataclasses.replace(
        architecture, model=dataclasses.replace(architecture.model, num_layers=2)
    ).measure(vocab_size=2)
    operations = 6 * architecture.seq_len * two.forward_flops_per_token
    return two.params_total * FLOAT32 * 2 < machine_bytes() and operations < TRIED_OPERATIONS


def predict_memory(config: RunConfig, *, vocab_size: int) -> Memory | None:
    """The peak memory of a run on one device.

    None for an external model, for a compiled one, and for one whose blocks are too large to be
    tried on this machine.
    """
    architecture, recipe, model = config.architecture, config.recipe, config.model
    if isinstance(model, ExternalConfig) or config.compile:
        return None
    assert isinstance(architecture, ModelParts)
    if not _can_be_tried(architecture):
        return None
    total = architecture.measure(vocab_size=vocab_size).params_total
    weights = total * (BFLOAT16 if recipe.precision == "bf16-true" else FLOAT32)
    rows = recipe.batch_size // config.trainer.devices
    counts = {
        (num_layers, num_rows): _kept_bytes(config, layers=num_layers, rows=num_rows)
        for num_layers in (1, 2)
        for num_rows in (1, 2)
    }

    def blocks(number: int) -> int:
        """Bytes kept by `number` blocks for all rows, extrapolated from the counts."""
        one = counts[1, 1] + (rows - 1) * (counts[1, 2] - counts[1, 1])
        two = counts[2, 1] + (rows - 1) * (counts[2, 2] - counts[2, 1])
        return one + (number - 1) * (two - one)

    device = config.trainer.device_type
    has_experts = isinstance(architecture.ffn, MoEConfig)
    is_bf16 = recipe.precision != "32-true"
    num_layers = model.num_layers
    tokens = rows * recipe.seq_len
    per_block = blocks(2) - blocks(1)
    states = tokens * model.hidden_dim * (BFLOAT16 if recipe.precision == "bf16-true" else FLOAT32)
    if config.trainer.activation_checkpointing:
        kept, recomputed = blocks(0) + num_layers * states, per_block
    else:
        kept, recomputed = blocks(num_layers), 0
    return Memory(
        weights=weights,
        gradients=weights,
        accumulated=weights if recipe.accumulate > 1 else 0,
        moments=2 * weights,
        buckets=weights if config.trainer.devices > 1 else 0,
        averages=weights * sum(r.num_weight_copies(device) for r in config.all_remedies),
        activations=kept
        + _loss_bytes(config, vocab_size, tokens=tokens, hidden_dim=model.hidden_dim),
        working=recomputed + WORKING_STATES * states,
        validation=_logits_bytes(config, vocab_size, recipe.val_rows * recipe.seq_len),
        program=PROGRAM_BYTES[device],
        kernels=KERNEL_BYTES if device == "cpu" and has_experts and is_bf16 else 0,
    )


def _kept_bytes(config: RunConfig, *, layers: int, rows: int) -> int:
    """Bytes that autograd keeps in a forward pass up to the final norm, without weights."""
    architecture = config.architecture
    assert isinstance(architecture, ModelParts)
    model = dataclasses.replace(
        architecture, model=dataclasses.replace(architecture.model, num_layers=layers)
    ).build(vocab_size=64, generator_for=lambda name: generator(0, "init", name))
    assert isinstance(model, Transformer)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            # A freed storage could give its address to another tensor, which would go uncounted.
            alive.append(storage)
        return tensor

    shape = rows, config.recipe.seq_len
    tokens_BT = torch.randint(64, shape, generator=generator(0, "memory"))
    precision = config.recipe.precision
    if precision == "bf16-true":
        model = model.to(torch.bfloat16)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.states(tokens_BT)
    return sum(kept.values())


def _loss_bytes(config: RunConfig, vocab_size: int, *, tokens: int, hidden_dim: int) -> int:
    """Bytes that the loss keeps: gradients if it is computed in chunks, otherwise all logits."""
    saves = saves_memory(vocab_size=vocab_size, hidden_dim=hidden_dim, num_tokens=tokens)
    if saves and not config.recipe.z_loss_weight and not _caps_logits(config):
        gradients = (tokens + vocab_size) * hidden_dim * FLOAT32
        return gradients + _logits_bytes(config, vocab_size, CHUNK)
    return _logits_bytes(config, vocab_size, tokens)


def _logits_bytes(config: RunConfig, vocab_size: int, tokens: int) -> int:
    """Bytes of the logits in float32, their log-softmax and, in half precision, the original."""
    half = 0 if config.recipe.precision == "32-true" else 2
    # The soft-cap keeps its tanh in float32, and the logits before and after it.
    capped = FLOAT32 + half if _caps_logits(config) else 0
    return tokens * vocab_size * (2 * FLOAT32 + half + capped)


def _caps_logits(config: RunConfig) -> bool:
    model = config.model
    return not isinstance(model, ExternalConfig) and model.head_softcap is not None


def run_hours(config: RunConfig, *, tokens_per_second: float) -> float:
    """Hours that the training steps of a run take at a measured speed.

    Raises:
        InputError: the speed is not positive and finite.
    """
    if not 0 < tokens_per_second < math.inf:
        raise InputError(f"tokens_per_second={tokens_per_second}: must be above 0 and finite")
    return config.last_step * config.recipe.tokens_per_step / tokens_per_second / 3600


def vocab_size(config: RunConfig) -> int:
    """The model's vocabulary size; loads the tokenizer only if the model does not fix the size."""
    fixed = config.architecture.vocab_size
    if fixed is not None:
        return fixed
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    return corpus.tokenizer.vocab_size
