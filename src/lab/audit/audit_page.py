"""What the page of experiments/audit says, computed from its tables."""

import csv
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from src.lab.book.predictions import predictions
from src.lab.detector.public_table import markdown

SEVEN = (
    *("minimax_m2", "minimax_m3_vl_text", "step3p7_text", "flint", "laguna", "cohere2_moe"),
    "kolibri1",
)
"""Families whose router divides by a sum of sigmoids without an epsilon."""

GUARDED = ("deepseek_v3", "dots1", "lfm2_moe", "mixtral", "qwen3_moe")
"""Families whose router has an epsilon or a softmax."""

ROUTER = re.compile(r"gate|router|moe|topk|expert")
ATTENTION = re.compile(r"attn|attention")
"""How the paths of such modules look."""

FAMILIES = {"first_": "first_families.csv"}
"""The file of the families by prefix; results.csv without one."""

EARLIER = "earlier_"
"""Prefix of the files of the survey before, which hold the families that the last one lacks."""

HEALTHY = 40
"""Other families, of which each top finding is judged by hand."""

WITNESS, SAFE = "witness found", "proved safe"


MEASURES = (
    *("recall", "false_alarms", "false_alarms_any", "routers_found", "guarded_proved"),
    *("contradictions", "slowest_seconds", "further_found", "healthy_found_wide"),
    *("judged_real", "judged_wrong", "later_recall", "later_alarms"),
)
"""The names that predictions may use."""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


class AuditPage:
    """The numbers and tables of the page.

    Args:
        folder: experiments/audit.
        prefix: of the files of families, findings and pairs.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self.folder, self.prefix = folder, prefix

    def _rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    @cached_property
    def repeated(self) -> Sequence[str]:
        """The audited families of the last survey; the others are those of the one before."""
        rows = self._rows(FAMILIES.get(self.prefix, "results.csv"))
        return [row["family"] for row in rows if row["status"] == "audited"]

    def _of_families(self, name: str) -> list[dict[str, str]]:
        """The rows of a file, with those of the survey before for families that it lacks."""
        own = FAMILIES.get(self.prefix, "results.csv")
        rows = self._rows(self.prefix + name if name != "results.csv" else own)
        if self.prefix or not (self.folder / f"{EARLIER}{name}").is_file():
            return rows
        done = {row["family"] for row in self._rows(own)}
        return rows + [row for row in self._rows(f"{EARLIER}{name}") if row["family"] not in done]

    @cached_property
    def families(self) -> Mapping[str, dict[str, str]]:
        """The rows of the audited families, by name in order."""
        rows = sorted(self._of_families("results.csv"), key=lambda row: row["family"])
        return {row["family"]: row for row in rows if row["status"] == "audited"}

    @property
    def num_changed(self) -> int:
        """Repeated families in which another number of operations is reached than before."""
        before = {row["family"]: row for row in self._rows(f"{EARLIER}results.csv")}
        return sum(self.families[n]["found"] != before[n]["found"] for n in self.repeated)

    @cached_property
    def findings(self) -> Sequence[dict[str, str]]:
        """The first findings of each family, most urgent first."""
        rows = self._of_families("findings.csv")
        return sorted(rows, key=lambda row: (row["family"], int(row["rank"])))

    @cached_property
    def left_out(self) -> int:
        """Families that could not be built small."""
        return sum(row["status"] != "audited" for row in self._of_families("results.csv"))

    @cached_property
    def pairs(self) -> Sequence[dict[str, str]]:
        """The rows of the public fixes."""
        return self._rows(f"{self.prefix}pairs.csv")

    @cached_property
    def first(self) -> "AuditPage":
        """The same of the first run, before what it showed was mended."""
        return AuditPage(self.folder, "first_")

    @cached_property
    def judged(self) -> Mapping[str, dict[str, str]]:
        """The judgement of each healthy family's top finding, by family."""
        return {row["family"]: row for row in self._rows("judged.csv")}

    @cached_property
    def healthy(self) -> Sequence[str]:
        """Forty other families: spread evenly over the alphabet."""
        others = [name for name in self.families if name not in SEVEN]
        places = (round(i * (len(others) - 1) / (HEALTHY - 1)) for i in range(HEALTHY))
        return [others[place] for place in places]

    @cached_property
    def top_findings(self) -> Mapping[str, dict[str, str]]:
        """The first finding of each family that has one."""
        return {row["family"]: row for row in reversed(self.findings)}

    @staticmethod
    def share(rows: Sequence[Mapping[str, str]], column: str) -> float:
        """The share of rows in which a column is True."""
        return sum(row[column] == "True" for row in rows) / len(rows)

    @property
    def recall(self) -> float:
        """The share of guilty lines that are reached before the fix."""
        return self.share(self.pairs, "found_before")

    @property
    def false_alarms(self) -> float:
        """The share of fixed models with an alarm in the precision in which people ran them."""
        return self.share(self.pairs, "alarm_after")

    @property
    def false_alarms_any(self) -> float:
        """The share of fixed models with an alarm in any precision."""
        return self.share(self.pairs, "alarm_after_any")

    @cached_property
    def later(self) -> Sequence[dict[str, str]]:
        """The fixes that were added when the search was finished; in `first` their first try."""
        tried = self._rows("first_later.csv")
        names = {row["pair"] for row in tried}
        return tried if self.prefix else [row for row in self.pairs if row["pair"] in names]

    @property
    def later_recall(self) -> float:
        """The share of the later guilty lines that are reached before the fix."""
        return self.share(self.later, "found_before")

    @property
    def later_alarms(self) -> int:
        """Later fixed models with an alarm in the precision in which people ran them."""
        return sum(row["alarm_after"] == "True" for row in self.later)

    @cached_property
    def alarms(self) -> Sequence[dict[str, str]]:
        """The fixed models with an alarm in any precision, each with its judgement."""
        said = {row["pair"]: row for row in self._rows("judged_pairs.csv")}
        return [
            {**row, **said[row["pair"]]} for row in self.pairs if row["alarm_after_any"] == "True"
        ]

    @property
    def alarms_same(self) -> int:
        """Alarms in whose precision the very witness of the bug makes the fixed model fail too."""
        return sum(bool(row["same_dtypes"]) for row in self.alarms)

    def alarms_judged(self, judgement: str) -> int:
        """How many of these alarms were judged so."""
        return sum(row["judgement"] == judgement for row in self.alarms)

    @property
    def false_alarms_judged(self) -> float:
        """The share of fixed models with an alarm in any precision that is not real."""
        false = len(self.alarms) - self.alarms_judged("real")
        return false / len(self.pairs)

    @property
    def alarms_table(self) -> str:
        """The alarms after the fix, each with its judgement, in Markdown."""
        rows = [
            [
                row["pair"],
                row["alarm_dtypes"],
                "yes" if row["same_dtypes"] else "no",
                row["alarm_how"],
                row["judgement"],
                row["why"],
            ]
            for row in self.alarms
        ]
        head = ["fix", "precisions", "witness of the bug too", "how", "judgement", "why"]
        return markdown(head, rows, numbers=())

    def _with_router(self, names: Sequence[str], verdict: str) -> list[str]:
        return [n for n in names if n in self.families and self.families[n]["router"] == verdict]

    @property
    def routers_found(self) -> int:
        """The routers of SEVEN with a witness in float32."""
        return len(self._with_router(SEVEN, WITNESS))

    @property
    def guarded_proved(self) -> int:
        """The routers of GUARDED whose division is proved safe."""
        return len(self._with_router(GUARDED, SAFE))

    @cached_property
    def further(self) -> list[dict[str, str]]:
        """The findings in float32 in a router or in attention of families that are not in SEVEN."""
        return [
            row
            for row in self.findings
            if row["family"] not in SEVEN
            and "float32" in row["dtypes"].split()
            and (ROUTER.search(row["module"]) or ATTENTION.search(row["module"]))
        ]

    @property
    def further_found(self) -> int:
        """The number of their families."""
        return len({row["family"] for row in self.further})

    @property
    def contradictions(self) -> int:
        """Witnesses at operations that were proved safe."""
        in_pairs = sum(row["proved_before"] == "True" for row in self.pairs)
        return in_pairs + sum(int(row["contradicted"]) for row in self.families.values())

    @property
    def slowest_seconds(self) -> float:
        """Of one family, in three precisions."""
        return max(float(row["seconds"]) for row in self.families.values())

    @property
    def num_late(self) -> int:
        """Families in which the search ended by its time limit."""
        return sum(row["ran_out_of_time"] == "True" for row in self.families.values())

    @property
    def median_seconds(self) -> float:
        """Of one family."""
        seconds = sorted(float(row["seconds"]) for row in self.families.values())
        return seconds[len(seconds) // 2]

    @property
    def total_minutes(self) -> float:
        """Of all families and pairs."""
        pairs = 2 * sum(float(row["seconds"]) for row in self.pairs)
        return (sum(float(row["seconds"]) for row in self.families.values()) + pairs) / 60

    @property
    def healthy_found(self) -> int:
        """Healthy families with any finding."""
        return sum(int(self.families[name]["found"]) > 0 for name in self.healthy)

    @property
    def healthy_found_wide(self) -> float:
        """The share of healthy families with a finding in float32 or bfloat16."""
        found = [int(self.families[name]["found_wide"]) > 0 for name in self.healthy]
        return sum(found) / len(found)

    def num_judged(self, verdict: str) -> int:
        """How many top findings of healthy families were judged so."""
        return sum(self.judged[n]["judgement"] == verdict for n in self.healthy if n in self.judged)

    @cached_property
    def judged_now(self) -> Sequence[dict[str, str]]:
        """The judgements of the families beside SEVEN in which something is found."""
        return [self.judged[n] for n in self.top_findings if n not in SEVEN]

    def all_judged(self, verdict: str) -> int:
        """How many of these were judged so."""
        return sum(row["judgement"] == verdict for row in self.judged_now)

    @property
    def recall_rebuilt(self) -> str:
        """The first run's hits among the pairs that could fail, in words."""
        return (
            "25 of 29 without two pairs that could not fail, and with one that was scored wrongly"
        )

    def _judged(self, verdict: str) -> float:
        total = sum(map(self.num_judged, ("real", "theoretical", "wrong")))
        return self.num_judged(verdict) / total if total else 0.0

    @property
    def judged_real(self) -> float:
        """The share of these findings that are real."""
        return self._judged("real")

    @property
    def judged_wrong(self) -> float:
        """The share of these findings that are wrong."""
        return self._judged("wrong")

    @property
    def sites(self) -> Mapping[str, int]:
        """Operations with a limit over all families: sites, proved, unknown."""
        names = ("sites", "proved", "unknown")
        return {n: sum(int(row[n]) for row in self.families.values()) for n in names}

    @property
    def predictions_table(self) -> str:
        """The predictions and what came of them, in Markdown."""
        words: dict[str, Any] = {name: getattr(self.first, name) for name in MEASURES}
        now: dict[str, Any] = {name: getattr(self, name) for name in MEASURES}
        rows = [
            [p.says, p.expected(), _number(p.found(words)), p.verdict(words), _number(p.found(now))]
            for p in predictions(self.folder)
        ]
        head = ["prediction", "expected", "first run", "", "now"]
        return markdown(head, rows, numbers=["first run", "now"])

    @property
    def routers_table(self) -> str:
        """The seven routers and the guarded ones, in Markdown."""
        rows = []
        for name in (*SEVEN, *GUARDED):
            row = self.families[name]
            top = self.top_findings.get(name, {})
            is_router = row["router"] == WITNESS
            rows.append(
                [
                    name,
                    row["router"] or "no division",
                    top.get("dtypes", "") if is_router else "",
                    f"`{top['place'].partition(': ')[0]}`" if is_router else "",
                    top.get("how", "") if is_router else "",
                    row["seconds"],
                ]
            )
        head = ["family", "router", "precisions", "line", "witness", "seconds"]
        return markdown(head, rows, numbers=["seconds"])

    @property
    def further_table(self) -> str:
        """The findings of further families, in Markdown."""
        rows = [
            [
                row["family"],
                f"`{row['place'].partition(': ')[0]}`",
                row["limit"],
                row["phase"],
                row["dtypes"],
                row["how"],
            ]
            for row in self.further
        ]
        head = ["family", "line", "limit", "pass", "precisions", "how"]
        return markdown(head, rows, numbers=())

    @property
    def healthy_table(self) -> str:
        """The healthy families with their top finding and its judgement, in Markdown."""
        rows = []
        for name in self.healthy:
            row, top = self.families[name], self.top_findings.get(name)
            said = self.judged.get(name, {"judgement": "", "why": ""})
            where = "" if top is None else f"`{top['place'].partition(': ')[0]}`"
            limit = "nothing found" if top is None else f"{top['limit']}, {top['dtypes']}"
            rows.append(
                [name, row["proved"], row["unknown"], limit, where, said["judgement"], said["why"]]
            )
        head = ["family", "proved", "unknown", "top finding", "line", "judgement", "why"]
        return markdown(head, rows, numbers=head[1:3])

    @property
    def pairs_table(self) -> str:
        """The public fixes, in Markdown."""
        rows = [
            [
                f"[{row['pair']}]({row['source']})",
                row["limit"],
                "found" if row["found_before"] == "True" else "missed",
                "**alarm**" if row["alarm_after"] == "True" else "none",
                "alarm" if row["alarm_after_any"] == "True" else "none",
            ]
            for row in self.pairs
        ]
        head = ["fix", "limit", "before", "after", "after, any precision"]
        return markdown(head, rows, numbers=())
