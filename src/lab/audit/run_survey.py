"""The survey: audits of all families that can be built small, and of public fixes."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nonfinite.auditing import Audit, Site, audit
from nonfinite.auditing.audit_report import SAFE, UNKNOWN, WITNESS
from nonfinite.mechanisms import INF_INF, MASKED, ZERO_INF
from src.cli.field_checks import choice, given_path, number
from src.common import terminal
from src.common.errors import InputError, nearest
from src.common.storage import write_rows
from src.lab.audit.fix_pairs import ALL, fix_pairs, judge
from src.lab.audit.survey_models import UndersizedError, families, small_model

FAMILIES, PAIRS = "families", "pairs"

ROUTER = re.compile(r"gate|router|moe|topk|expert|mixer|ffn|feed_forward|mlp")
ATTENTION = re.compile(r"attn|attention")

ALLOWED = ("loss_utils.py", "cross_entropy", "CrossEntropyLoss", "loss_fct", "loss_function")
"""Texts in lines that compute the loss: a batch without a label fails in each of them."""

LISTED = 5
"""Findings of a family that are written."""


@dataclass(frozen=True, kw_only=True)
class FamilyAnswer:
    """What the audit of one family says."""

    family: str
    status: str
    """audited, or why not."""
    sites: int = 0
    proved: int = 0
    """Sites that are proved safe in all precisions."""
    unknown: int = 0
    found: int = 0
    """Operations with a witness; the loss's mean over labels is left out."""
    found_wide: int = 0
    """Of these, with a witness in float32 or bfloat16."""
    router: str = ""
    """The verdict of divisions in routers: that of the worst; "" if there is none."""
    attention: str = ""
    """The verdict of operations with a domain in attention; "" if there is none."""
    contradicted: int = 0
    """Sites with a proof and a witness: errors of the audit."""
    ran_out_of_time: bool = False
    seconds: float = 0.0


def survey(given: Mapping[str, Any]) -> int:
    """Runs the survey and writes its tables; returns the exit code.

    Raises:
        InputError: a field is invalid.
    """
    only = choice(given, "only", (None, FAMILIES, PAIRS))
    seconds = number(given, "seconds", float, least=1)
    out = given_path(given, "out")
    names = [] if only == PAIRS else _chosen(given["families"])
    if only != FAMILIES:
        _survey_pairs(out, seconds)
    if only != PAIRS:
        _survey_families(names, out, seconds)
    return 0


def _chosen(names: Any) -> list[str]:
    known = families()
    if names is None:
        return known
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InputError(f"families={names}: must be a list, such as families=[llama]")
    for name in names:
        if name not in known:
            raise InputError(f"families: no family {name}; {nearest(str(name), known)}")
    return list(names)


def _survey_pairs(out: Path, seconds: float) -> None:
    answers = []
    for kind in fix_pairs():
        answers.append(judge(kind, seconds=seconds))
        one = answers[-1]
        marks = "found" if one.found_before else "missed"
        terminal.say(f"{one.pair}: {marks}{', false alarm' if one.alarm_after else ''}")
        write_rows(out / "pairs.csv", [asdict(answer) for answer in answers])


def _survey_families(names: Iterable[str], out: Path, seconds: float) -> None:
    answers: list[FamilyAnswer] = []
    findings: list[dict[str, Any]] = []
    for family in names:
        try:
            model, inputs = small_model(family)
            found = audit(model, inputs, folder=None, seconds=seconds, allow=ALLOWED)
        except (UndersizedError, ValueError) as error:
            answers.append(FamilyAnswer(family=family, status=str(error)))
        else:
            answers.append(family_answer(family, found))
            findings += [_finding(family, rank, s) for rank, s in enumerate(found.places, 1)]
        one = answers[-1]
        terminal.say(f"{family}: {one.status}, {one.found} found, {one.seconds} s")
        write_rows(out / "results.csv", [asdict(answer) for answer in answers])
        if findings:
            write_rows(out / "findings.csv", [f for f in findings if f["rank"] <= LISTED])


def family_answer(family: str, found: Audit) -> FamilyAnswer:
    """The row of a family."""
    wide = [s for s in found.found if {"float32", "bfloat16"} & set(s.witnesses)]
    return FamilyAnswer(
        family=family,
        status="audited",
        sites=len(found.sites),
        proved=len(found.with_verdict(SAFE)),
        unknown=len(found.with_verdict(UNKNOWN)),
        found=len(found.places),
        found_wide=len({(s.source, s.operation) for s in wide}),
        router=worst(found, ROUTER, divisions=True),
        attention=worst(found, ATTENTION, divisions=False),
        contradicted=sum(site.was_contradicted for site in found.sites),
        ran_out_of_time=found.ran_out_of_time,
        seconds=round(found.seconds, 1),
    )


def worst(found: Audit, modules: re.Pattern[str], *, divisions: bool) -> str:
    """The worst verdict in float32 of the operations with a domain in some modules.

    Args:
        found: an audit.
        modules: how the paths of the modules look.
        divisions: whether divisions by a sum alone are looked at, such as a router's.
    """
    verdicts = {
        site.verdict("float32")
        for site in found.sites
        if site.phase == "forward"
        and not site.is_overflow
        and any(modules.search(path) for path in site.modules)
        and (not divisions or _divides_by_sum(site))
        and (divisions or site.limit not in (MASKED, INF_INF, ZERO_INF) or site.witnesses)
    }
    return next((v for v in (WITNESS, UNKNOWN, SAFE) if v in verdicts), "")


def _divides_by_sum(site: Site) -> bool:
    """Whether a site is a division; the epsilon of a norm is no router's."""
    return site.operation == "div" and site.limit in (
        "division by zero",
        "division by a tiny number",
    )


def _finding(family: str, rank: int, sites: Sequence[Site]) -> dict[str, Any]:
    """A row of findings.csv, for an operation and its derivatives."""
    site = sites[0]
    dtypes = [d for d in ALL if any(d in one.witnesses for one in sites)]
    best = site.best
    return {
        "family": family,
        "rank": rank,
        "place": site.place,
        "limit": site.limit,
        "phase": site.phase,
        "module": site.modules[0],
        "dtypes": " ".join(dtypes),
        "changes": best.changes,
        "doublings": "" if best.doublings == float("inf") else round(best.doublings, 1),
        "how": best.how,
        "detail": best.finding.detail or "",
    }
