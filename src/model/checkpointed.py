"""Activation checkpointing: a block's inside is computed again for its backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.model.ffn.router import Router


def checkpointed(block: nn.Module, x_BTD: Tensor, *others: Any) -> Tensor:
    """What the block gives, of which only its inputs are kept (Chen et al., arXiv 1604.06174).

    The same operations on the same numbers, so the same gradients, bitwise where those are.
    Nothing in a block of ours draws; its routers count a batch once.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _uncounted(block)

    return checkpoint(
        block, x_BTD, *others, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


@contextmanager
def _uncounted(block: nn.Module) -> Iterator[None]:
    """Inside, routers leave their counts, losses and figures as the forward pass has made them."""
    routers = [module for module in block.modules() if isinstance(module, Router)]
    for router in routers:
        router.is_again = True
    try:
        yield
    finally:
        for router in routers:
            router.is_again = False
