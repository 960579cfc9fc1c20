"""What a public fix consists of: a model before and after it, and inputs that do not fail."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

INF = float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that do not depend on the global random state."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    """Numbers in [0, 1) that do not depend on the global random state."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class FixPair(nn.Module):
    """The base of all pairs. The mechanism is rebuilt from the report; no code is copied.

    Args:
        fixed: whether the fix is in.
    """

    source: ClassVar[str]
    """Address of the public report."""
    line: ClassVar[str]
    """A regular expression for the guilty line before the fix."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """Precisions in which people ran it."""

    def __init__(self, *, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        torch.manual_seed(0)
        self.build()

    def build(self) -> None:
        """Creates the layers."""
        self.net = nn.Linear(8, 6)

    @staticmethod
    def inputs() -> tuple[Any, ...]:
        """Arguments of the model, on which neither version fails."""
        return (normal(4, 8),)

    @classmethod
    def name(cls) -> str:
        """The name of the pair."""
        return cls.__name__
