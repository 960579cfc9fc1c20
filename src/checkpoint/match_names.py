"""Loads weights from a file into a module whose parameter names differ by a prefix."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from src.common.errors import InputError


def load_weights(module: nn.Module, saved: Mapping[str, Any], *, place: Path) -> str | None:
    """Loads weights into a module, after finding the prefix under which the file has all its names.

    The weights may be the file's `state_dict`, the file itself, or any other table in it. Either
    the file's names have the prefix, such as those of a training task, or the module's names do,
    such as those of a wrapper around the model. The file may hold tied weights only once.

    Returns:
        A sentence about tensors in the file that were not used; None if all were.

    Raises:
        InputError: no prefix fits, or a shape differs.
    """
    own = module.state_dict(keep_vars=True)
    tables = [saved["state_dict"]] if "state_dict" in saved else [saved, *saved.values()]
    found = next((f for f in (_fitting(table, own) for table in tables) if f is not None), None)
    if found is None:
        missing = _missing(own, {str(name) for name, _ in named_tensors(saved)})
        raise InputError(f"checkpoint={place}: does not fit the model: {missing} is missing")
    table, places = found
    for name, value in own.items():
        # A lazy parameter takes the shape of the loaded tensor.
        if not isinstance(value, Tensor) or is_lazy(value):
            continue
        shape = tuple(table[places[name]].shape)
        if shape != tuple(value.shape):
            raise InputError(
                f"checkpoint={place}: does not fit the model: {places[name]} is {shape},"
                f" must be {tuple(value.shape)}"
            )
    module.load_state_dict({name: table[places[name]] for name in own})
    used = set(places.values())
    left = sum(isinstance(v, Tensor) and name not in used for name, v in table.items())
    return f"the model does not use {left} tensors of the checkpoint" if left else None


def named_tensors(tree: Any) -> Iterator[tuple[Any, Tensor]]:
    """All tensors in nested containers, each with the last key that leads to it."""
    if not isinstance(tree, Mapping | list | tuple):
        return
    for name, inner in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(inner, Tensor):
            yield name, inner
        else:
            yield from named_tensors(inner)


def _fitting(table: Any, own: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, str]] | None:
    """The table, and its name for each of the module's names; None if a name is missing."""
    if not isinstance(table, Mapping):
        return None
    first = next(iter(own.values()))
    same = [name for name, value in own.items() if value is first]
    names = [name for name in table if isinstance(name, str)]
    for cut in _wrappers(own):
        ends = [name.removeprefix(cut) for name in same]
        prefixes = {n.removesuffix(end) for n in names for end in ends if n.endswith(end)}
        for prefix in sorted(prefixes, key=len):
            places = _places(table, own, cut=cut, prefix=prefix)
            if places is not None:
                return table, places
    return None


def _missing(own: Mapping[str, Any], names: Set[str]) -> str:
    """The module's first name that the file has under no prefix."""
    cut = _wrappers(own)[-1]
    known = set()
    for name, value in own.items():
        end = name.removeprefix(cut)
        if any(given == end or given.endswith(f".{end}") for given in names):
            known.add(id(value))
    return next((name for name, value in own.items() if id(value) not in known), next(iter(own)))


def _wrappers(own: Mapping[str, Any]) -> list[str]:
    """Prefixes that all names of a module share, such as `model.`, from none to the longest."""
    cuts = [""]
    while True:
        part, dot, _ = next(iter(own), "").removeprefix(cuts[-1]).partition(".")
        longer = f"{cuts[-1]}{part}."
        if not dot or not all(name.startswith(longer) for name in own):
            return cuts
        cuts.append(longer)


def _places(
    table: Mapping[str, Any], own: Mapping[str, Any], *, cut: str, prefix: str
) -> dict[str, str] | None:
    """The table's name for each of the module's names, directly or through a tied parameter."""
    sought = {name: prefix + name.removeprefix(cut) for name in own}
    known = {
        name: place
        for name, place in sought.items()
        if place in table and isinstance(table[place], Tensor) == isinstance(own[name], Tensor)
    }
    shared = {id(own[name]): place for name, place in known.items()}
    if any(name not in known and id(value) not in shared for name, value in own.items()):
        return None
    return {name: known.get(name, shared.get(id(value), "")) for name, value in own.items()}
