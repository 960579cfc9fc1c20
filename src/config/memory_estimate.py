"""What a run will need of memory at its peak, from its configuration and two small passes.

Kept activations are counted, not guessed: the model with one block and with two, at its own
widths, runs forward on one row and on two, and autograd is asked what it keeps. That is linear in
blocks and in rows, so four counts give any number of them.
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

FLOAT32 = 4

PROGRAM_BYTES = {"cpu": 510 * 2**20, "cuda": 500 * 2**20}
"""What is there before a model is: Python and its libraries, or a context of CUDA."""

KERNEL_BYTES = 530 * 2**20
"""oneDNN's products in bfloat16, as many as process_setup lets it keep; measured at two sizes."""

WORKING_STATES = 4
"""Tensors of a layer's states (B, T, D) that its backward pass has at once."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a training process, on the device where the model is.

    Those of tensors that are there, and of programs. What an allocator holds beyond them is not
    counted: little on a GPU; on a CPU up to a fifth, for experts in bfloat16 up to four tenths,
    because glibc's heap grows with every number of tokens that a batch gives an expert. Activations
    are those of a CPU, whose attention keeps its probabilities in float32, which a GPU's does not.
    """

    weights: int
    gradients: int
    accumulated: int
    """Gradients of earlier micro-batches, beside the activations of the next one."""
    moments: int
    """AdamW's two."""
    buckets: int
    """In which several devices exchange gradients."""
    averages: int
    """Averaged weights, where an option keeps or carries them."""
    activations: int
    """Kept from the forward pass for the backward pass, those of the loss included."""
    working: int
    """Gradients of activations, and what a block computes again, while a backward pass is in it."""
    validation: int
    """Logits of a validation batch, which are there while gradients and activations are not."""
    program: int
    """Libraries and their state."""
    kernels: int
    """On a CPU, of experts in bfloat16: a kernel for every number of tokens that one may get."""

    @property
    def kept(self) -> int:
        """What is there all the time."""
        programs = self.program + self.kernels
        return self.weights + self.moments + self.buckets + self.averages + programs

    @property
    def step(self) -> int:
        """The most that is there at once in a training step."""
        # Activations go as gradients come.
        return self.kept + max(self.accumulated + self.activations + self.working, self.gradients)

    @property
    def peak(self) -> int:
        """The most that is there at once in a run."""
        return max(self.step, self.kept + self.validation)

    def plain(self) -> dict[str, Any]:
        """The figures by name."""
        return {**dataclasses.asdict(self), "peak": self.peak}


TRIED_OPERATIONS = 2e13
"""Floating-point operations of the small passes, beyond which no one would wait for them."""


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(config: RunConfig, *, vocab_size: int) -> None:
    """Compares the least that a run needs with this machine, by arithmetic, before it is built.

    Raises:
        InputError: the model alone, or the states that a step keeps, are more than there is.
    """
    architecture, recipe = config.architecture, config.recipe
    if not isinstance(architecture, ModelParts):
        return
    total = architecture.measure(vocab_size=vocab_size).params_total
    on_cpu = config.trainer.device_type == "cpu"
    # Built on the CPU in any case; trained there, its gradients and AdamW's moments come on top.
    least = total * FLOAT32 * (4 if on_cpu else 1)
    what = f"model: {total:,} parameters"
    if on_cpu and not config.trainer.activation_checkpointing:
        states = architecture.model.hidden_dim * architecture.model.num_layers * 2
        least += recipe.batch_size * recipe.seq_len * states
        what += f" and a step of {recipe.batch_size * recipe.seq_len:,} tokens"
    if least > machine_bytes():
        raise InputError(
            f"{what} need at least {least / 2**30:,.0f} GiB, and this machine has"
            f" {machine_bytes() / 2**30:,.0f}; make model.* or recipe.batch_size smaller"
        )


def _can_be_tried(architecture: ModelParts) -> bool:
    """Whether two of its blocks fit into this machine, and run here within a minute or so."""
    two = dataclasses.replace(
        architecture, model=dataclasses.replace(architecture.model, num_layers=2)
    ).measure(vocab_size=2)
    operations = 6 * architecture.seq_len * two.forward_flops_per_token
    return two.params_total * FLOAT32 * 2 < machine_bytes() and operations < TRIED_OPERATIONS


def predict_memory(config: RunConfig, *, vocab_size: int) -> Memory | None:
    """The memory of a run on one device.

    None for a model that is not ours, a compiled one, or one whose blocks are too large to be tried
    here.
    """
    architecture, recipe, model = config.architecture, config.recipe, config.model
    if isinstance(model, ExternalConfig) or config.compile:
        return None
    assert isinstance(architecture, ModelParts)
    if not _can_be_tried(architecture):
        return None
    total = architecture.measure(vocab_size=vocab_size).params_total
    weights = total * FLOAT32
    rows = recipe.batch_size // config.trainer.devices
    counts = {
        (layers, of): _kept_bytes(config, layers=layers, rows=of)
        for layers in (1, 2)
        for of in (1, 2)
    }

    def blocks(number: int) -> int:
        """Kept for so many blocks, all rows."""
        one = counts[1, 1] + (rows - 1) * (counts[1, 2] - counts[1, 1])
        two = counts[2, 1] + (rows - 1) * (counts[2, 2] - counts[2, 1])
        return one + (number - 1) * (two - one)

    device = config.trainer.device_type
    has_experts = isinstance(architecture.ffn, MoEConfig)
    is_bf16 = recipe.precision == "bf16-mixed"
    num_layers = model.num_layers
    tokens = rows * recipe.seq_len
    a_block = blocks(2) - blocks(1)
    states = tokens * model.hidden_dim * FLOAT32
    if config.trainer.activation_checkpointing:
        kept, again = blocks(0) + num_layers * states, a_block
    else:
        kept, again = blocks(num_layers), 0
    return Memory(
        weights=weights,
        gradients=weights,
        accumulated=weights if recipe.accumulate > 1 else 0,
        moments=2 * weights,
        buckets=weights if config.trainer.devices > 1 else 0,
        averages=weights * sum(remedy.keeps_average for remedy in config.all_remedies),
        activations=kept
        + _loss_bytes(config, vocab_size, tokens=tokens, hidden_dim=model.hidden_dim),
        working=again + WORKING_STATES * states,
        validation=_logits_bytes(config, vocab_size, recipe.val_rows * recipe.seq_len),
        program=PROGRAM_BYTES[device],
        kernels=KERNEL_BYTES if device == "cpu" and has_experts and is_bf16 else 0,
    )


def _kept_bytes(config: RunConfig, *, layers: int, rows: int) -> int:
    """What autograd keeps of a forward pass up to the final norm, besides weights."""
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
            # A storage that went would give its address to another.
            alive.append(storage)
        return tensor

    shape = rows, config.recipe.seq_len
    tokens_BT = torch.randint(64, shape, generator=generator(0, "memory"))
    bf16 = config.recipe.precision == "bf16-mixed"
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.states(tokens_BT)
    return sum(kept.values())


def _loss_bytes(config: RunConfig, vocab_size: int, *, tokens: int, hidden_dim: int) -> int:
    """What the loss keeps: its gradients where it is made in chunks, else all its logits."""
    saves = saves_memory(vocab_size=vocab_size, hidden_dim=hidden_dim, num_tokens=tokens)
    if saves and not config.recipe.z_loss_weight:
        gradients = (tokens + vocab_size) * hidden_dim * FLOAT32
        return gradients + _logits_bytes(config, vocab_size, CHUNK)
    return _logits_bytes(config, vocab_size, tokens)


def _logits_bytes(config: RunConfig, vocab_size: int, tokens: int) -> int:
    """Logits, their logarithmic softmax and, in a half precision, the logits as they came."""
    half = 0 if config.recipe.precision == "32-true" else 2
    return tokens * vocab_size * (2 * FLOAT32 + half)


def run_hours(config: RunConfig, *, tokens_per_second: float) -> float:
    """Hours of a run's training steps at a known speed.

    Raises:
        InputError: there is no such speed.
    """
    if not 0 < tokens_per_second < math.inf:
        raise InputError(f"tokens_per_second={tokens_per_second}: must be above 0 and finite")
    return config.last_step * config.recipe.tokens_per_step / tokens_per_second / 3600


def vocab_size(config: RunConfig) -> int:
    """Rows of the embedding; the tokenizer is asked only where the model leaves them open."""
    fixed = config.architecture.vocab_size
    if fixed is not None:
        return fixed
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    return corpus.tokenizer.vocab_size
