"""The list of public fixes, and what an audit says of each before and after."""

import contextlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nonfinite.auditing import Audit, Site, audit
from nonfinite.auditing.saved_witness import read_witness, run_witness
from src.lab.audit import fixed_divisions, fixed_edges, fixed_later
from src.lab.audit.fix_pair import FixPair

ALL = ("float32", "bfloat16", "float16")


def fix_pairs() -> list[type[FixPair]]:
    """All pairs, in the order of their files."""
    found = []
    for module in (fixed_divisions, fixed_edges, fixed_later):
        for value in vars(module).values():
            is_pair = isinstance(value, type) and issubclass(value, FixPair)
            if is_pair and value is not FixPair:
                found.append(value)
    return found


@dataclass(frozen=True, kw_only=True)
class PairAnswer:
    """What audits of one pair say."""

    pair: str
    source: str
    found_before: bool
    """Whether a witness is found at the guilty line, in a precision in which people ran it."""
    proved_before: bool
    """Whether the guilty line was proved safe there although it fails: a wrong proof."""
    alarm_after: bool
    """Whether a witness is found anywhere after the fix, in these precisions."""
    alarm_after_any: bool
    """Whether one is found anywhere after the fix in any of three precisions."""
    limit: str
    """The limit that was found before the fix, or after it if there is a false alarm; else ""."""
    how: str
    """What the witness changes; "" without one."""
    alarm_dtypes: str
    """The precisions in which a witness is found after the fix."""
    alarm_line: str
    """The line of the first of these; "" without one."""
    alarm_how: str
    """What its witness changes."""
    same_dtypes: str
    """The precisions in which the very witness of the bug makes the fixed model fail too."""
    seconds: float
    """Of the slower audit."""


def judge(kind: type[FixPair], *, seconds: float = 60.0) -> PairAnswer:
    """Audits both versions of a pair in three precisions."""
    with tempfile.TemporaryDirectory() as folder:
        before = _audited(kind(fixed=False), kind, seconds, folder)
        after = _audited(kind(fixed=True), kind, seconds)
        hits = [site for site in before.found if _is_guilty(site, kind) and _in(site, kind)]
        same = _failing(kind, hits)
    alarms = [site for site in after.found if _in(site, kind)]
    shown = (hits or alarms)[:1]
    witness = next((w for site in shown for w in site.witnesses.values()), None)
    contradicted = any(site.was_contradicted for one in (before, after) for site in one.sites)
    first = after.found[0] if after.found else None
    return PairAnswer(
        pair=kind.name(),
        source=kind.source,
        found_before=bool(hits),
        proved_before=contradicted,
        alarm_after=bool(alarms),
        alarm_after_any=bool(after.found),
        limit=shown[0].limit if shown else "",
        how="" if witness is None else witness.how,
        alarm_dtypes=" ".join(d for d in ALL if any(d in s.witnesses for s in after.found)),
        alarm_line="" if first is None or first.source is None else first.source.code,
        alarm_how="" if first is None else first.best.how,
        same_dtypes=" ".join(d for d in ALL if d in same),
        seconds=round(max(before.seconds, after.seconds), 1),
    )


def _failing(kind: type[FixPair], hits: Sequence[Site]) -> set[str]:
    """The precisions in which the fixed model fails on a witness of the bug."""
    found = set()
    for site in hits:
        for dtype, witness in site.witnesses.items():
            if dtype in kind.dtypes and witness.file is not None:
                saved = read_witness(witness.file)
                for name in ALL:
                    # A model may not run in each precision, such as with -1e9 in float16.
                    with contextlib.suppress(ValueError):
                        again = run_witness(kind(fixed=True), {**saved, "dtype": name})
                        found |= set() if again.finding is None else {name}
    return found


def _audited(
    model: FixPair, kind: type[FixPair], seconds: float, folder: str | None = None
) -> Audit:
    dtypes = [getattr(torch, name) for name in ALL]
    inputs: Any = kind.inputs()
    return audit(model, inputs, dtypes=dtypes, folder=folder, seconds=seconds)


def _is_guilty(site: Site, kind: type[FixPair]) -> bool:
    return site.source is not None and re.search(kind.line, site.source.code) is not None


def _in(site: Site, kind: type[FixPair]) -> bool:
    """Whether a site has a witness in a precision in which people ran the model."""
    return any(dtype in site.witnesses for dtype in kind.dtypes)
