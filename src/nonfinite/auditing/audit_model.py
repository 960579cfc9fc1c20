"""`nonfinite.audit`: the passes as given, the proofs, the search, and the saved witnesses."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nonfinite.auditing.audit_collector import Collector, SiteKey
from nonfinite.auditing.audit_report import Audit, Site, ranked
from nonfinite.auditing.audited_passes import Passes
from nonfinite.auditing.reach import (
    Reach,
    leaves_of,
    movable_buffers,
    num_rows,
    weight_ranges,
)
from nonfinite.auditing.saved_witness import save_witness
from nonfinite.auditing.witness_search import Search
from nonfinite.auditing.witnessed_sites import with_witnesses
from nonfinite.origins import memory_of
from nonfinite.snapshot import host_states, set_host_states

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def audit(
    model: nn.Module,
    inputs: Any,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    mixed: bool = False,
    reach: Reach | None = None,
    seconds: float = 60.0,
    folder: str | Path | None = "audit",
    allow: Sequence[str] = (),
) -> Audit:
    """Finds the operations of a model that can divide by zero, overflow or leave their domain.

    The model runs forward and backward on the inputs; then other inputs and weights within reach
    are tried until an operation fails. The model itself is not changed.

    Args:
        model: any module, in the mode in which it is to be looked at.
        inputs: what it is called with: a mapping (keyword arguments), a tuple or list (arguments),
            or one argument. If its output is a scalar, or has a field `loss`, that is
            differentiated, else all of its outputs.
        dtypes: precisions, such as torch.float16; weights and floating-point inputs are converted.
        mixed: whether they stay in float32 instead, and operations run under autocast.
        reach: the range of weights and inputs; None: that of `Reach`.
        seconds: the search ends within this time; the first pass in each dtype is always made.
        folder: where witnesses are saved; None: nowhere.
        allow: texts; a site whose line holds one of them is accepted.

    Returns:
        The answer, which prints as a table.

    Raises:
        ValueError: a dtype is none, or the model cannot be copied, or be run on the inputs.
    """
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"dtypes: {dtype!r} must be a floating-point dtype, such as torch.float16"
            )
    host = host_states()
    try:
        with torch.random.fork_rng():
            passes = {_name(dtype): Passes(model, dtype, mixed=mixed) for dtype in dtypes}
            return _audited(
                type(model).__name__,
                passes,
                inputs,
                reach or Reach(),
                seconds=seconds,
                folder=folder,
                allow=allow,
            )
    finally:
        set_host_states(host)


def _audited(
    name: str,
    passes: dict[str, Passes],
    inputs: Any,
    reach: Reach,
    *,
    seconds: float,
    folder: str | Path | None,
    allow: Sequence[str],
) -> Audit:
    """See `audit`, which keeps random states."""
    start = time.monotonic()
    last, pass_seconds = list(passes)[-1], 0.0
    refused: dict[str, str] = {}
    sites: dict[tuple[SiteKey, str], Site] = {}
    for dtype in list(passes):
        begun = time.monotonic()
        try:
            _collect(passes[dtype], dtype, inputs, reach, sites)
        except Exception as error:
            # Some operations do not exist in some dtypes on some devices, and some numbers of the
            # code do not fit.
            refused[dtype] = str(error).partition("\n")[0]
            del passes[dtype]
            if not passes and dtype == last:
                raise ValueError(f"the model cannot be run on these inputs ({error})") from error
        pass_seconds = max(pass_seconds, time.monotonic() - begun)
    for one in passes.values():
        _let_buffers_move(one, inputs)
    own_passes = dict(passes)
    search = Search(
        passes=dict(own_passes),
        inputs=inputs,
        reach=reach,
        sites=sites,
        until=start + seconds,
        pass_seconds=pass_seconds,
    )
    with warnings.catch_warnings():
        # torch warns of some of what changed inputs do, such as the deviation of one element.
        warnings.simplefilter("ignore")
        search.run()
    found = ranked(with_witnesses(sites, search))
    answer = Audit(
        model=name,
        dtypes=list(passes),
        refused=refused,
        reach=str(reach),
        sites=found,
        seconds=time.monotonic() - start,
        ran_out_of_time=search.ran_out,
        fails_as_given=search.fails_as_given,
        allow=allow,
    )
    if folder is not None:
        tries = {id(witness): tried for tried, witness in search.witnesses.values()}
        for number, site in enumerate(answer.found, start=1):
            for dtype, witness in site.witnesses.items():
                file = Path(folder) / f"witness-{number}-{dtype}.pt"
                save_witness(file, witness, tries[id(witness)], own_passes[dtype])
                witness.file = file
    return answer


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _collect(
    passes: Passes, dtype: str, inputs: Any, reach: Reach, sites: dict[tuple[SiteKey, str], Site]
) -> None:
    """Runs the model as given in one dtype, and adds what it shows to the sites."""
    given = passes.cast(inputs)
    ranges = weight_ranges(passes.model, reach)
    for _, leaf in leaves_of(given):
        if isinstance(leaf, Tensor) and not leaf.is_complex():
            ranges[memory_of(leaf)] = reach.of_input(leaf)
    collector = Collector(passes.model, ranges, rows=num_rows(given))
    passes.traced({}, given, collector)
    for (key, limit), seen in collector.seen.items():
        site = sites.get((key, limit))
        if site is None:
            site = sites[key, limit] = Site(
                phase=key[0],
                operation=key[3],
                limit=limit,
                source=seen.source,
                modules=seen.modules,
            )
        site.doublings[dtype], site.reasons[dtype] = seen.doublings, seen.reason


def _let_buffers_move(passes: Passes, inputs: Any) -> None:
    """Lets a search move saved buffers, such as a router's bias, if the model permits it."""
    buffers = [b for _, b in movable_buffers(passes.model)]
    for buffer in buffers:
        buffer.requires_grad_(True)
    try:
        passes.loss(passes.cast(inputs))
    except Exception:  # such as a module that writes into a buffer in place
        for buffer in buffers:
            buffer.detach_().requires_grad_(False)
    finally:
        passes.reset()
