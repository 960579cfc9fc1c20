"""Weights out of a file put into a module, under whatever names the two have."""

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from src.common.errors import InputError


def load_weights(module: nn.Module, saved: Mapping[str, Any], *, place: Path) -> str | None:
    """Puts weights into a module, under the one prefix by which all of its names are found.

    They are the file's `state_dict`, the file itself, or any other table in it. The prefix is one
    of the file's names, as those of a training task, or one of the module's, as those of a wrapper
    around the model. Of weights that share a parameter the file may hold one alone.

    Returns:
        What of the file was left out, in words.

    Raises:
        InputError: there is no such prefix, or a shape differs.
    """
    own = module.state_dict(keep_vars=True)
    tables = [saved["state_dict"]] if "state_dict" in saved else [saved, *saved.values()]
    found = next((f for f in (_fitting(table, own) for table in tables) if f is not None), None)
    if found is None:
        missing = _missing(own, {str(name) for name, _ in named_tensors(saved)})
        raise InputError(f"checkpoint={place}: does not fit the model: has no {missing}")
    table, places = found
    for name, value in own.items():
        # A lazy one takes the shape of what it is given.
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
    return f"{left} tensors of the checkpoint are none of the model's" if left else None


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
    """The table, and the name in it for each name of a module; None where some are not there."""
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
    """The first name of a module that is found under no prefix; the first of all where none is."""
    cut = _wrappers(own)[-1]
    known = set()
    for name, value in own.items():
        end = name.removeprefix(cut)
        if any(given == end or given.endswith(f".{end}") for given in names):
            known.add(id(value))
    return next((name for name, value in own.items() if id(value) not in known), next(iter(own)))


def _wrappers(own: Mapping[str, Any]) -> list[str]:
    """What all names of a module begin with, as `model.`; first nothing, then ever more."""
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
    """The name in the table for each of a module's, its own or one that shares its parameter."""
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
