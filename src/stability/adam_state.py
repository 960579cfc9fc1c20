"""AdamW's moments, for remedies that read or change them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
"""The names under which torch's Adam and AdamW keep their first and second moment."""


def adam_states(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The state of every parameter that the optimizer keeps both moments of, entry by entry.

    Empty before the first step, and for parameters that another rule updates.
    """
    return {
        parameter: state
        for parameter, state in optimizer.state.items()
        if all(
            isinstance(state.get(name), Tensor) and state[name].shape == parameter.shape
            for name in MOMENTS
        )
    }


def require_adam(optimizer: torch.optim.Optimizer, remedy: str) -> None:
    """Raises ValueError if the optimizer has made a step and keeps no moments as AdamW does."""
    if optimizer.state and not adam_states(optimizer):
        raise ValueError(
            f"optimizer={type(optimizer).__name__}: {remedy} needs one that keeps exp_avg and"
            " exp_avg_sq, as AdamW does"
        )
