"""Models in which one known thing goes wrong, for `model=external`.

A small Llama of transformers, in which a fault is planted. When it strikes, and how fast it grows,
is drawn from the run's seed. Axes: B batch, T time, V vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

FLOAT32_DECADES = math.log(torch.finfo(torch.float32).max)
FLOAT16_DECADES = math.log(torch.finfo(torch.float16).max)


class Clock(nn.Module):
    """Counts training steps, and says how large a fault is in each.

    The count is a buffer, so that a run that goes on from a saved state knows how late it is.

    Args:
        steps: of the run.
        grows_by: logarithm by which a fault that grows has grown at its end.
    """

    def __init__(self, *, steps: int, grows_by: float) -> None:
        super().__init__()
        begin, length = torch.rand(2).tolist()
        self.register_buffer("steps_made", torch.zeros((), dtype=torch.long))
        self.begin = round((0.1 + 0.3 * begin) * steps)
        self.rate = grows_by / ((0.25 + 0.2 * length) * steps)
        self.strikes_at = round((0.3 + 0.6 * begin) * steps)

    @property
    def step(self) -> int:
        """Steps that are over."""
        return int(cast(Tensor, self.steps_made))

    @property
    def factor(self) -> float:
        """1 until the fault begins, then growing evenly in its logarithm."""
        # Further than any overflow, and no further: Python's own floats end, too.
        return math.exp(min(max(0, self.step - self.begin) * self.rate, 200.0))

    @property
    def strikes(self) -> bool:
        """Whether this is the step of a fault that comes once."""
        return self.step == self.strikes_at


class Faulty(nn.Module):
    """Gives a model's logits; a fault is planted when it is built."""

    def __init__(self, model: LlamaForCausalLM, clock: Clock) -> None:
        super().__init__()
        self.model, self.clock = model, clock
        self.masks_a_row = False

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        return self.model(tokens_BT, use_cache=False, **self._mask(tokens_BT)).logits

    def _mask(self, tokens_BT: Tensor) -> dict[str, Tensor]:
        if not self.masks_a_row:
            return {}
        num_rows, time = tokens_BT.shape
        mask_B1TT = torch.full((num_rows, 1, time, time), -math.inf).triu(1)
        if self.training and self.clock.strikes:
            mask_B1TT[0] = -math.inf
        return {"attention_mask": mask_B1TT}

    def finish_step(self, *, applied: bool) -> None:
        """The step is over, applied or not."""
        cast(Tensor, self.clock.steps_made).add_(1)


def attention_growth(model: Faulty) -> None:
    """Queries and keys of the second layer grow without bound, and so do their products.

    Scores give no gradient: its squares would overflow long before the scores themselves.
    """

    def grow(module: Any, args: Any, output: Tensor) -> Tensor:
        return output.detach() * math.sqrt(model.clock.factor)

    for name in ("q_proj", "k_proj"):
        path = f"model.model.layers.1.self_attn.{name}"
        model.get_submodule(path).register_forward_hook(grow)


def output_growth(model: Faulty) -> None:
    """The head's logits grow without bound, their gradient does not."""

    def grow(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + (output * (model.clock.factor - 1)).detach()

    model.get_submodule("model.lm_head").register_forward_hook(grow)


def float16_overflow(model: Faulty) -> None:
    """The second layer's MLP gives float16, and its numbers grow out of it."""

    def round_off(module: Any, args: Any, output: Tensor) -> Tensor:
        return (output * model.clock.factor).half().float()

    model.get_submodule("model.model.layers.1.mlp.down_proj").register_forward_hook(round_off)


def gradient_growth(model: Faulty) -> None:
    """The gradient of the first layer's MLP grows without bound; the forward pass is sound."""
    weight = model.get_parameter("model.model.layers.0.mlp.up_proj.weight")
    weight.register_hook(lambda gradient: gradient * model.clock.factor)


def infinite_gradient(model: Faulty) -> None:
    """One entry of a gradient is infinite, once."""

    def strike(gradient: Tensor) -> Tensor:
        if not model.clock.strikes:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[0] = math.inf
        return gradient

    model.get_parameter("model.model.layers.1.self_attn.k_proj.weight").register_hook(strike)


def nan_weight(model: Faulty) -> None:
    """A weight becomes NaN between two steps."""

    def strike(module: Any, args: Any) -> None:
        if model.training and model.clock.strikes:
            with torch.no_grad():
                model.get_parameter("model.model.layers.0.self_attn.o_proj.weight")[0, 0] = math.nan

    model.register_forward_pre_hook(strike)


def masked_row(model: Faulty) -> None:
    """A batch comes with a row in which nothing is to be attended to, once."""
    model.masks_a_row = True


FAULTS: dict[str, tuple[Callable[[Faulty], None], float]] = {
    "none": (lambda model: None, 0.0),
    "attention_growth": (attention_growth, FLOAT32_DECADES),
    "output_growth": (output_growth, FLOAT32_DECADES),
    "float16_overflow": (float16_overflow, FLOAT16_DECADES),
    # Squares overflow at half of the exponent.
    "gradient_growth": (gradient_growth, FLOAT32_DECADES / 2),
    "infinite_gradient": (infinite_gradient, 0.0),
    "nan_weight": (nan_weight, 0.0),
    "masked_row": (masked_row, 0.0),
}
"""What plants each, and the logarithm by which it grows until it fails."""


def build(*, vocab_size: int, max_seq_len: int, fault: str, steps: int) -> nn.Module:
    """A Llama with a fault.

    Args:
        vocab_size, max_seq_len: of the model.
        fault: one of FAULTS.
        steps: of the run, of which the fault's times are fractions.
    """
    plant, grows_by = FAULTS[fault]
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=vocab_size,
        max_position_embeddings=max_seq_len,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        # Only this implementation has a softmax that a mask of nothing turns into NaN.
        attn_implementation="eager" if fault == "masked_row" else "sdpa",
    )
    model = Faulty(LlamaForCausalLM(config), Clock(steps=steps, grows_by=grows_by))
    plant(model)
    return model
