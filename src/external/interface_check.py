"""Checks before training what an external model must offer; `src.external.model` lists it."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonfinite.rerun import routers_of, undisturbed
from nonfinite.snapshot import host_states, set_host_states, unsaved
from src.common.errors import InputError
from src.external.load_target import running

NAME = re.compile(r"[A-Za-z_][\w.-]*")
"""Allowed names of losses and statistics, which become parts of metric names."""

BUILT_IN_LOSSES = ("loss", "z_loss")
"""Loss terms that training itself adds."""


def logits_of(model: nn.Module, tokens_BT: Tensor, *, what: str) -> Tensor:
    """Logits of one forward pass in evaluation mode; leaves the model unchanged.

    Args:
        model: maps token ids to logits.
        tokens_BT: the model's input.
        what: field and value; error lines begin with them.

    Raises:
        InputError: the forward pass raises, or does not return logits.
    """
    with undisturbed(model), torch.no_grad():
        model.eval()
        return _run_forward(model, tokens_BT, what=what)


def _run_forward(model: nn.Module, tokens_BT: Tensor, *, what: str) -> Tensor:
    given = f"{what}: token ids of shape {tuple(tokens_BT.shape)}"
    with running(given):
        logits = model(tokens_BT)
    is_tensor = isinstance(logits, Tensor)
    if not is_tensor or logits.dim() != 3 or logits.shape[:2] != tokens_BT.shape:
        shape = tuple(logits.shape) if is_tensor else type(logits).__name__
        raise InputError(f"{given} gave {shape}; must give a tensor (batch, time, vocabulary)")
    if not logits.is_floating_point():
        raise InputError(f"{given} gave logits in {logits.dtype}; must be floating point")
    return cast(Tensor, logits)


def check_interface(model: nn.Module, tokens_BT: Tensor, *, what: str) -> None:
    """Runs a forward and a backward pass, and the optional methods of a model.

    Args:
        model: the model, on the CPU; it is unchanged afterwards.
        tokens_BT: a batch of token ids.
        what: field and value; error lines begin with them.

    Raises:
        InputError: the model does not meet the requirements in src.external.model.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{what}: {path or 'the model'} is a torch.jit module, which instruments cannot"
                " look into; must be an ordinary nn.Module"
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InputError(f"{what}: {name} is on {parameter.device}; must be on the CPU")
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(f"{what}: {name} is {parameter.dtype}; must be torch.float32")
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and _overlaps(value):
            raise InputError(
                f"{what}: entries of {name} share memory, so no saved state can be loaded into it;"
                " clone() it, or register it with persistent=False"
            )
    with undisturbed(model):
        model.train()
        logits_BTV = _run_forward(model, tokens_BT, what=what)
        extra = _extra_losses(model, what=what)
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())
        if not loss.requires_grad:
            raise InputError(f"{what}: logits do not depend on any trainable parameter")
        with running(f"{what}: backward pass"):
            (loss + sum(extra.values())).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise InputError(
                    f"{what}: the gradient of {name} is sparse; must be dense, because guard and"
                    " optimizer do not support sparse gradients"
                )
        for path, router in routers_of(model):
            _check_router_stats(router, what=f"{what}: router_stats of {path or 'the model'}")
        _call_finish_methods(model, what=what)
    num_inactive_params(model, what=what)


def check_autocast(model: nn.Module, tokens_BT: Tensor, *, what: str, dtype: torch.dtype) -> None:
    """Runs a forward and a backward pass in the mixed precision of the run.

    Raises:
        InputError: the model cannot be trained in it, although it can in float32.
    """
    with undisturbed(model), running(f"{what}: in mixed precision"):
        model.train()
        with torch.autocast("cpu", dtype=dtype):
            logits_BTV = model(tokens_BT)
        logits_BTV.float().logsumexp(dim=-1).mean().backward()


def _overlaps(tensor: Tensor) -> bool:
    """Whether several entries share one place in memory, as after `expand`."""
    if tensor.layout != torch.strided:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _call_finish_methods(model: nn.Module, *, what: str) -> None:
    """Calls finish_batch and finish_step if they exist; restores the parameters afterwards."""
    methods = {"finish_batch": {}, "finish_step": {"applied": False}}
    methods = {name: given for name, given in methods.items() if hasattr(model, name)}
    if not methods:
        return
    values = [parameter.detach().clone() for parameter in model.parameters()]
    for name, given in methods.items():
        with running(f"{what}: {name}"):
            getattr(model, name)(**given)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


def unsaved_state(model: nn.Module, tokens_BT: Tensor) -> list[str]:
    """Paths of state that a training step changes but a checkpoint does not save.

    A number counts if one step changes it. A tensor or container counts if a second, identical step
    changes it again; otherwise each pass just overwrites it, and it carries nothing to the next.

    Args:
        model: a model that has passed `check_interface`; it is unchanged afterwards.
        tokens_BT: a batch of token ids.
    """
    with undisturbed(model):
        model.train()
        drawn, host = torch.get_rng_state(), host_states()
        states = [unsaved(model)]
        for _ in range(2):
            torch.set_rng_state(drawn)
            set_host_states(host)
            with running("a step"):
                model(tokens_BT)
                _call_finish_methods(model, what="a step")
            states.append(unsaved(model))
    before, after, later = states
    changed = {n for n, value in after.items() if before.get(n) != value}
    numbers = {n for n in changed if isinstance(after[n], str)}
    return [n for n, value in later.items() if n in numbers or after.get(n) != value]


def _extra_losses(model: nn.Module, *, what: str) -> Mapping[str, Tensor]:
    method = getattr(model, "extra_losses", None)
    if method is None:
        return {}
    with running(f"{what}: extra_losses"):
        extra: Any = method()
    what = f"{what}: extra_losses returned"
    if not isinstance(extra, Mapping):
        raise InputError(f"{what} a {type(extra).__name__}; must be a dict of losses by name")
    for name, loss in extra.items():
        _check_name(name, what=what)
        if name in BUILT_IN_LOSSES:
            raise InputError(f"{what} {name}, which is a built-in loss; use another name")
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            raise InputError(
                f"{what} {name} as {_kind(loss)}; must be a floating-point scalar tensor"
            )
    return extra


def _check_router_stats(router: Any, *, what: str) -> None:
    with running(what):
        stats: Any = router.router_stats()
    if not isinstance(stats, Mapping):
        raise InputError(
            f"{what}: returned a {type(stats).__name__}; must be a dict of floats by name"
        )
    for name, value in stats.items():
        _check_name(name, what=f"{what}: returned")
        if not isinstance(value, int | float):
            raise InputError(f"{what}: returned {name} as {_kind(value)}; must be a float")


def _check_name(name: Any, *, what: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{what} {name!r}; names may hold only letters, digits and _ . -")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def num_inactive_params(model: nn.Module, *, what: str) -> int:
    """Parameters that a single token does not use; 0 if the model has no such method.

    Raises:
        InputError: the model's method returns anything but a valid number.
    """
    method = getattr(model, "num_inactive_params", None)
    if method is None:
        return 0
    with running(f"{what}: num_inactive_params"):
        num: Any = method()
    total = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(num, int) or not 0 <= num < total:
        raise InputError(
            f"{what}: num_inactive_params returned {num!r}; must be an integer below {total}"
        )
    return num
