"""Brings the witnesses of a search to the operations that they belong to."""

from collections.abc import Mapping

from nonfinite import mechanisms
from nonfinite.auditing.audit_collector import SiteKey
from nonfinite.auditing.audit_report import Site
from nonfinite.auditing.witness_search import Search


def with_witnesses(
    sites: dict[tuple[SiteKey, str], Site], search: Search
) -> dict[tuple[SiteKey, str], Site]:
    """The sites with what the search found; operations that only it has seen are added."""
    for (key, dtype), (_, witness) in search.witnesses.items():
        finding = witness.finding
        limit = finding.mechanism or UNEXPLAINED
        mine = {name: site for (known, name), site in sites.items() if known == key}
        site = _site_of(limit, mine)
        if site is None:
            site = sites[key, limit] = Site(
                phase=finding.phase,
                operation=key[3],
                limit=limit,
                source=finding.source,
                modules=[finding.module],
            )
        elif finding.mechanism is not None and limit != site.limit and not site.witnesses:
            site.limit = limit
        site.was_contradicted |= site.reasons.get(dtype) is not None
        site.witnesses[dtype] = witness
    return sites


UNEXPLAINED = "unknown"
"""The limit of an operation whose operands do not say why it failed."""

EDGES = (
    mechanisms.ZERO,
    mechanisms.EDGE,
    mechanisms.LOG,
    mechanisms.DOMAIN,
    mechanisms.MASKED,
    mechanisms.ONE,
    mechanisms.EMPTY,
    mechanisms.EXP,
)
"""An operation has one of these limits, but a trace may name it by another of them."""


def _site_of(limit: str, mine: Mapping[str, Site]) -> Site | None:
    """The site of an operation to which a failure of this kind belongs."""
    if limit in mine:
        return mine[limit]
    if limit in (*EDGES, UNEXPLAINED):
        return next((site for name, site in mine.items() if name in EDGES), None)
    overflows = (
        (mechanisms.HALF, mechanisms.OVERFLOW)
        if limit in (mechanisms.TINY, mechanisms.HALF, mechanisms.OVERFLOW)
        else ()
    )
    return next((site for name, site in mine.items() if name in overflows), None)
