"""What an audit says: for each operation with a limit whether it is safe, and what reaches it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nonfinite.auditing.operation_limits import ADVICE
from nonfinite.finding import Finding, as_recorded
from nonfinite.mechanisms import HALF, INF_INF, NO_LABEL, OVERFLOW, ZERO_INF
from nonfinite.source_lines import Source

SAFE, WITNESS, UNKNOWN = "proved safe", "witness found", "unknown"
"""The answers for a site."""

AS_IS, INPUT, WEIGHTS = "as given", "input", "weights"
"""What a witness changes."""

LIKELY = {AS_IS: 0, INPUT: 1, WEIGHTS: 2}

SHOWN = 5
"""Sites in the table for people."""

ALL = "format=json, or as_dict() in Python, lists all"


@dataclass(kw_only=True)
class Witness:
    """An input, or weights, for which an operation was seen to fail."""

    dtype: str
    changes: str
    """One of AS_IS, INPUT and WEIGHTS."""
    how: str
    """A sentence: what was changed, and by how much."""
    doublings: float
    """Factors of two by which the largest changed weight had to grow; 0 for inputs."""
    finding: Finding
    file: Path | None = None
    """Where it is saved; None if it is not."""


def _width(dtype: str) -> int:
    """Smaller for a wider precision."""
    order = ("float64", "float32", "bfloat16", "float16")
    return order.index(dtype) if dtype in order else len(order)


@dataclass(kw_only=True)
class Site:
    """One operation of the code with one limit, over all layers."""

    phase: str
    operation: str
    limit: str
    """A mechanism of `nonfinite.mechanisms`."""
    source: Source | None
    modules: list[str]
    doublings: dict[str, float] = field(default_factory=dict)
    """By dtype: factors of two between this pass and the limit."""
    reasons: dict[str, str | None] = field(default_factory=dict)
    """By dtype: why the limit can never be reached within reach; None if that is not proved."""
    witnesses: dict[str, Witness] = field(default_factory=dict)
    """By dtype."""
    was_contradicted: bool = False
    """Whether a witness was found although it was proved safe: an error of the audit."""

    def verdict(self, dtype: str) -> str:
        """SAFE, WITNESS or UNKNOWN in a dtype."""
        if dtype in self.witnesses:
            return WITNESS
        return SAFE if self.reasons.get(dtype) is not None else UNKNOWN

    @property
    def best(self) -> Witness:
        """The likeliest witness, in the widest precision that has one of this kind."""
        return min(self.witnesses.values(), key=lambda w: (LIKELY[w.changes], _width(w.dtype)))

    @property
    def is_overflow(self) -> bool:
        """Whether the limit is the largest number of the dtype."""
        return self.limit in (HALF, OVERFLOW)

    @property
    def place(self) -> str:
        """The line of code, or the module where none is known."""
        if self.source is not None:
            return str(self.source)
        return f"{self.modules[0] or 'the top-level module'}: {self.operation}"

    @property
    def advice(self) -> str | None:
        """The usual fix, in one line."""
        return ADVICE.get(self.limit)

    @property
    def rank(self) -> tuple[float, ...]:
        """Smaller for what is more likely and nearer."""
        found = list(self.witnesses.values())
        least = min((LIKELY[w.changes] for w in found), default=9)
        drift = min((w.doublings for w in found if LIKELY[w.changes] == least), default=math.inf)
        # What fails in the precision with the widest range is likelier to be met.
        wide = "float32" not in self.witnesses and "bfloat16" not in self.witnesses
        near = min(self.doublings.values(), default=math.inf)
        # Every mean over labels has this limit; a loader that skips such batches removes them all.
        is_usual = self.limit == NO_LABEL
        return (not found, self.is_overflow, wide, is_usual, least, drift, near)


@dataclass(kw_only=True)
class Audit:
    """The answer of `nonfinite.audit`, which prints as a table."""

    model: str
    dtypes: list[str]
    reach: str
    sites: list[Site]
    """All of them, most urgent first."""
    seconds: float
    ran_out_of_time: bool
    fails_as_given: Sequence[str] = ()
    """The dtypes in which the model fails as it is; no other weights were tried in them, and
    nothing else at all if these are all dtypes."""
    allow: Sequence[str] = ()
    """Texts; a site whose line holds one of them is accepted."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """What the model raised in each dtype in which it cannot be run."""

    def is_allowed(self, site: Site) -> bool:
        """Whether the user accepts what was found here."""
        return any(text in site.place for text in self.allow)

    @property
    def found(self) -> list[Site]:
        """The sites with a witness that are not accepted, most urgent first."""
        return [site for site in self.sites if site.witnesses and not self.is_allowed(site)]

    @property
    def places(self) -> list[list[Site]]:
        """The sites in `found`, those of one operation together: it and its derivatives."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.found:
            key = (site.source, site.operation) if site.source is not None else (id(site),)
            groups.setdefault(key, []).append(site)
        return list(groups.values())

    def with_verdict(self, verdict: str) -> list[Site]:
        """The sites that have this answer in some dtype, and no stronger one in another."""
        order = (WITNESS, UNKNOWN, SAFE)
        return [
            site
            for site in self.sites
            if min((site.verdict(d) for d in site.reasons or self.dtypes), key=order.index)
            == verdict
        ]

    def as_dict(self) -> dict[str, Any]:
        """The whole answer as plain values."""
        return {
            "model": self.model,
            "dtypes": self.dtypes,
            "refused": dict(self.refused),
            "reach": self.reach,
            "seconds": round(self.seconds, 1),
            "ran_out_of_time": self.ran_out_of_time,
            "fails_as_given": list(self.fails_as_given),
            "found": len(self.found),
            "sites": [
                {**_site_values(site, self.dtypes), "allowed": self.is_allowed(site)}
                for site in self.sites
            ],
        }

    def __str__(self) -> str:
        return "\n".join(table(self))


def _site_values(site: Site, dtypes: Sequence[str]) -> dict[str, Any]:
    witnesses = {
        dtype: {
            "changes": w.changes,
            "how": w.how,
            "doublings": w.doublings,
            "detail": w.finding.detail,
            "file": None if w.file is None else str(w.file),
            "finding": as_recorded(w.finding),
        }
        for dtype, w in site.witnesses.items()
    }
    return {
        "phase": site.phase,
        "operation": site.operation,
        "limit": site.limit,
        "source": None if site.source is None else vars(site.source),
        "modules": site.modules,
        "verdict": {d: site.verdict(d) for d in dtypes if d in site.reasons or d in site.witnesses},
        "doublings": {d: None if math.isinf(v) else round(v, 2) for d, v in site.doublings.items()},
        "reason": site.reasons,
        "witness": witnesses,
        "advice": site.advice,
        "was_contradicted": site.was_contradicted,
    }


def table(audit: Audit) -> list[str]:
    """The lines for people: at most a screen, most urgent first."""
    found = audit.places
    places = f"{len(found)} {'place' if len(found) == 1 else 'places'}" if found else "no place"
    lines = [
        f"{audit.model}: NaN or Inf reached at {places}; {len(audit.sites)} operations have a limit"
        f" ({', '.join(audit.dtypes)})",
        f"range: {audit.reach}; took {audit.seconds:.0f} s",
    ]
    for number, sites in enumerate(found[:SHOWN], start=1):
        lines += ["", *_lines_of(number, sites)]
    if len(found) > SHOWN:
        lines += ["", f"... and {len(found) - SHOWN} more; {ALL}"]
    reached = {(site.source, site.operation) for site in audit.sites if site.witnesses}
    # The derivative of an operation that fails itself is no news.
    unknown = [s for s in audit.with_verdict(UNKNOWN) if (s.source, s.operation) not in reached]
    lines += ["", _counts(audit, unknown)]
    domain = [s for s in unknown if not s.is_overflow and s.limit not in (INF_INF, ZERO_INF)]
    if domain:
        # Lines that read alike are shown once: several operations of a line may have one limit.
        told = list(dict.fromkeys(f"  {s.limit} ({s.phase}): {s.place}" for s in domain))
        lines += ["neither proved nor reached, nearest first:", *told[:SHOWN]]
        if len(told) > SHOWN:
            lines += [f"  ... and {len(told) - SHOWN} more; {ALL}"]
    accepted = sum(bool(site.witnesses) and audit.is_allowed(site) for site in audit.sites)
    if accepted:
        lines += [f"accepted by allow: {accepted}"]
    for dtype, error in audit.refused.items():
        lines += [f"not looked at in {dtype}, in which the model cannot be run: {error}"]
    if len(audit.fails_as_given) == len(audit.dtypes):
        lines += ["the model fails as it is, so nothing else was tried: fix it and audit it again"]
    elif audit.fails_as_given:
        lines += [
            f"in {' and '.join(audit.fails_as_given)} the model fails as it is, so no other weights"
            " were tried there: fix it and audit it again"
        ]
    if audit.ran_out_of_time:
        lines += ["the search ended by its time limit, so it may find more with a larger seconds="]
    return lines


def _counts(audit: Audit, unknown: Sequence[Site]) -> str:
    safe, reached = audit.with_verdict(SAFE), sum(bool(site.witnesses) for site in audit.sites)
    overflows = sum(site.is_overflow for site in unknown)
    behind = len(audit.sites) - len(safe) - reached - len(unknown)
    more = f", {behind} behind reached ones" if behind else ""
    return (
        f"reached: {reached}; proved safe in this range, on the path that ran: {len(safe)};"
        f" unknown: {len(unknown) + behind} ({overflows} overflows{more})"
    )


def _lines_of(number: int, sites: Sequence[Site]) -> list[str]:
    site = sites[0]
    dtypes = sorted({dtype for one in sites for dtype in one.witnesses}, key=_width)
    best = site.best
    where = site.modules[0] or "the top-level module"
    more = f" and {len(site.modules) - 1} more" if len(site.modules) > 1 else ""
    detail = f": {best.finding.detail}" if best.finding.detail else ""
    # A line may hold many operations that can overflow.
    which = f" of {site.operation}" if site.is_overflow else ""
    lines = [
        f"{number}. {site.place}",
        f"   {site.limit}{which}{detail}",
        f"   in {where}{more} ({site.phase}); {', '.join(dtypes)}",
        f"   how: {best.how} ({best.dtype})",
    ]
    if best.file is not None:
        lines += [f"   witness: {best.file}"]
    if site.advice is not None:
        lines += [f"   usual fix: {site.advice}"]
    return lines


def ranked(sites: Mapping[Any, Site]) -> list[Site]:
    """Sites, most urgent first."""
    return sorted(sites.values(), key=lambda site: site.rank)
