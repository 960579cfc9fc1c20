"""Why a model does not accept a batch of token ids."""

import contextlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nonfinite.rerun import undisturbed


def misfit(
    task: nn.Module, run: Callable[[], Any], batch: Any, *, own_path: Callable[[str], str]
) -> str:
    """The embedding that has no row for an id or a position; else the batch's own sizes.

    Args:
        task: the module that failed.
        run: runs its forward pass again.
        batch: its input. For anything but inputs and targets (B, T) the result is empty.
        own_path: gives the path of a module as the user's model has it.
    """
    is_pair = isinstance(batch, tuple) and len(batch) == 2
    if not is_pair or not all(isinstance(t, Tensor) and t.dim() == 2 for t in batch):
        return ""
    tokens_BT = batch[0]
    largest = max(int(ids.max()) for ids in batch)
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            ids = args[0] if args else None
            if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel() or found:
                return
            last, rows = int(ids.max()), cast(nn.Embedding, module).num_embeddings
            if last < rows:
                return
            if last == int(tokens_BT.max()):
                found.append(
                    f"the largest token id is {last}, and {name} has {rows} rows: ids must be from"
                    f" 0 to {rows - 1}"
                )
            else:
                found.append(
                    f"its rows have {tokens_BT.shape[1]} tokens, and {name} has {rows} rows: they"
                    f" must have at most {rows} tokens and a target"
                )

        return hook

    embeddings = [(n, m) for n, m in task.named_modules() if isinstance(m, nn.Embedding)]
    hooks = [module.register_forward_pre_hook(look(own_path(name))) for name, module in embeddings]
    try:
        with undisturbed(task), torch.no_grad(), contextlib.suppress(Exception, SystemExit):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    sizes = f"the largest token id is {largest}, and its rows have {tokens_BT.shape[1]} tokens"
    return f"; {found[0] if found else sizes}"
