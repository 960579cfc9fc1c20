"""What a model that is not ours must be able to do, tried before anything is trained."""

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nonfinite.random_state import host_states, set_host_states
from nonfinite.rerun import routers_of, undisturbed
from nonfinite.snapshot import unsaved
from src.common.errors import InputError
from src.external.load_target import running

NAME = re.compile(r"[A-Za-z_][\w.-]*")
"""Of a figure, so that it can be part of a metric's name."""

TAKEN = ("loss", "z_loss")
"""Terms of the loss that are ours."""


def logits_of(model: nn.Module, tokens_BT: Tensor, *, what: str) -> Tensor:
    """Logits of one forward pass in evaluation mode, which leaves the model as it was.

    Args:
        model: token ids to logits.
        tokens_BT: its input.
        what: begins the line of an error.

    Raises:
        InputError: the pass raises, or gives something else.
    """
    with undisturbed(model), torch.no_grad():
        model.eval()
        return _checked(model, tokens_BT, what=what)


def _checked(model: nn.Module, tokens_BT: Tensor, *, what: str) -> Tensor:
    given = f"{what}: token ids of shape {tuple(tokens_BT.shape)}"
    with running(given):
        logits = model(tokens_BT)
    is_tensor = isinstance(logits, Tensor)
    if not is_tensor or logits.dim() != 3 or logits.shape[:2] != tokens_BT.shape:
        shape = tuple(logits.shape) if is_tensor else type(logits).__name__
        raise InputError(f"{given} give {shape}, must give a tensor (batch, time, vocabulary)")
    if not logits.is_floating_point():
        raise InputError(f"{given} give logits in {logits.dtype}, must be floating point")
    return cast(Tensor, logits)


def check_contract(model: nn.Module, tokens_BT: Tensor, *, what: str) -> None:
    """Tries a forward and a backward pass, and the methods that a model may have.

    Args:
        model: on the CPU; is as it was afterwards.
        tokens_BT: a batch.
        what: begins the line of an error.

    Raises:
        InputError: anything is not as src.external.model promises it to the rest of the project.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{what}: {path or 'the model'} is compiled by torch.jit, must be Python's:"
                " instruments cannot look into it"
            )
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise InputError(f"{what}: {name} is on {parameter.device}, must be on the CPU")
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise InputError(f"{what}: {name} is {parameter.dtype}, must be torch.float32")
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and _overlaps(value):
            raise InputError(
                f"{what}: entries of {name} share their memory, so that no saved state can be"
                " loaded into it; clone() it, or let it be persistent=False"
            )
    with undisturbed(model):
        model.train()
        logits_BTV = _checked(model, tokens_BT, what=what)
        extra = _extra_losses(model, what=what)
        loss = F.cross_entropy(logits_BTV.float().flatten(0, 1), tokens_BT.flatten())
        if not loss.requires_grad:
            raise InputError(f"{what}: the logits hang on no parameter that is to be trained")
        with running(f"{what}: backward pass"):
            (loss + sum(extra.values())).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise InputError(
                    f"{what}: the gradient of {name} is sparse, must be dense: neither guard nor"
                    " optimizer takes another"
                )
        for path, router in routers_of(model):
            _check_figures(router, what=f"{what}: router_stats of {path or 'the model'}")
        _finish(model, what=what)
    num_inactive_params(model, what=what)


def _overlaps(tensor: Tensor) -> bool:
    """Whether one place in memory is several entries, as `expand` makes it."""
    if tensor.layout != torch.strided:
        return False
    return any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True))


def _finish(model: nn.Module, *, what: str) -> None:
    """Calls what is called after a batch and after a step; the parameters stay as they are."""
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
    """What a step of training changes and a checkpoint does not hold, by its path.

    Numbers that one step changes; tensors and containers that a second step, the same as the
    first, changes once more: what each pass only writes anew is no memory of the last.

    Args:
        model: has passed `check_contract`; is as it was afterwards.
        tokens_BT: a batch.
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
                _finish(model, what="a step")
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
    what = f"{what}: extra_losses gives"
    if not isinstance(extra, Mapping):
        raise InputError(f"{what} a {type(extra).__name__}, must be losses by name")
    for name, loss in extra.items():
        _check_name(name, what=what)
        if name in TAKEN:
            raise InputError(f"{what} {name}, which is a term of the training's own")
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            raise InputError(f"{what} {name} as {_kind(loss)}, must be a tensor of one number")
    return extra


def _check_figures(router: Any, *, what: str) -> None:
    with running(what):
        stats: Any = router.router_stats()
    if not isinstance(stats, Mapping):
        raise InputError(f"{what}: gives a {type(stats).__name__}, must be figures by name")
    for name, value in stats.items():
        _check_name(name, what=f"{what}: gives")
        if not isinstance(value, int | float):
            raise InputError(f"{what}: gives {name} as {_kind(value)}, must be a float")


def _check_name(name: Any, *, what: str) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(f"{what} {name!r}, must be named by letters, digits and _ . -")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def num_inactive_params(model: nn.Module, *, what: str) -> int:
    """Parameters that a single token does not pass through; 0 where the model does not say.

    Raises:
        InputError: it says something that is no such number.
    """
    method = getattr(model, "num_inactive_params", None)
    if method is None:
        return 0
    with running(f"{what}: num_inactive_params"):
        num: Any = method()
    total = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(num, int) or not 0 <= num < total:
        raise InputError(
            f"{what}: num_inactive_params gives {num!r}, must be an integer from 0 to below {total}"
        )
    return num
