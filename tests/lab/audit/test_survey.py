"""The survey of audits: its pairs, its families, and what its page counts."""

import csv
from pathlib import Path

import pytest
import torch

from nonfinite.auditing.audited_passes import Passes
from src.lab.__main__ import main
from src.lab.audit.audit_page import GUARDED, HEALTHY, SEVEN, AuditPage
from src.lab.audit.fix_pairs import fix_pairs, judge
from src.lab.audit.survey_models import UndersizedError, small_model
from tests.runs import ROOT

PAGE = AuditPage(ROOT / "experiments" / "audit")


def test_there_are_at_least_twenty_pairs_from_different_reports():
    pairs = fix_pairs()
    assert len(pairs) >= 20
    assert len({pair.source for pair in pairs}) == len(pairs)
    assert all(pair.__doc__ and pair.source.startswith("https://") for pair in pairs)


@pytest.mark.parametrize("pair", fix_pairs(), ids=lambda pair: pair.name())
def test_neither_version_of_a_pair_fails_on_its_own_inputs(pair):
    for fixed in (False, True):
        for name in pair.dtypes:
            passes = Passes(pair(fixed=fixed), getattr(torch, name))
            assert passes.traced({}, pair.inputs()) is None


@pytest.mark.parametrize(
    "name", ["PaddingBatch", "RootThenEpsilon", "LogVariance", "HalfMask", "SingleAdvantage"]
)
def test_a_pair_is_found_before_and_not_after(name):
    (pair,) = [pair for pair in fix_pairs() if pair.name() == name]
    answer = judge(pair)
    assert answer.found_before
    assert not answer.alarm_after
    assert not answer.proved_before


@pytest.mark.slow
@pytest.mark.parametrize("pair", fix_pairs(), ids=lambda pair: pair.name())
def test_a_pair_is_judged_as_the_table_says(pair):
    (row,) = [row for row in PAGE.pairs if row["pair"] == pair.name()]
    answer = judge(pair)
    assert str(answer.found_before) == row["found_before"]
    assert str(answer.alarm_after) == row["alarm_after"]


def test_a_family_that_is_too_large_is_left_out_without_building_it():
    with pytest.raises(UndersizedError):
        small_model("gpt_neo_of_nobody")


def test_the_survey_writes_a_row_for_each_family(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    families = "families=[minimax_m2,mixtral]"
    assert main(["survey", families, "only=families", "out=here", "seconds=20"]) == 0
    with Path("here/results.csv").open() as file:
        rows = {row["family"]: row for row in csv.DictReader(file)}
    assert rows["minimax_m2"]["router"] == "witness found"
    assert rows["mixtral"]["router"] == "proved safe"
    assert all(row["contradicted"] == "0" for row in rows.values())


def test_a_family_that_does_not_exist_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["survey", "families=[mixtrall]"]) == 2
    assert "mixtral" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_page_judges_each_finding_of_forty_other_families():
    assert len(set(PAGE.healthy)) == HEALTHY
    assert not set(PAGE.healthy) & set(SEVEN)
    with_finding = [name for name in PAGE.healthy if name in PAGE.top_findings]
    assert all(name in PAGE.judged for name in with_finding)
    verdicts = {PAGE.judged[name]["judgement"] for name in with_finding}
    assert verdicts <= {"real", "theoretical", "wrong"}


def test_the_page_finds_what_the_table_holds():
    assert PAGE.routers_found == sum(
        PAGE.families[name]["router"] == "witness found" for name in SEVEN
    )
    assert all(name in PAGE.families for name in (*SEVEN, *GUARDED))
    assert 0 <= PAGE.false_alarms <= PAGE.false_alarms_any <= 1


def test_each_alarm_after_a_fix_is_judged():
    assert {row["judgement"] for row in PAGE.alarms} <= {"real", "theoretical"}
    assert PAGE.alarms_judged("real") + PAGE.alarms_judged("theoretical") == len(PAGE.alarms)
    assert PAGE.false_alarms <= PAGE.false_alarms_any
    # The witness of the bug makes each of these fail too, so that no judgement can call it false.
    assert all(row["judgement"] == "real" for row in PAGE.alarms if row["same_dtypes"])


def test_the_first_try_of_later_fixes_is_kept_beside_today():
    assert len(PAGE.later) == len(PAGE.first.later) == 5
    assert {row["pair"] for row in PAGE.later} <= {pair.name() for pair in fix_pairs()}
    assert PAGE.first.later_recall < 1.0


ROW = "family,status,found,seconds\n"


def test_a_family_that_was_not_repeated_has_the_row_of_the_survey_before(tmp_path):
    (tmp_path / "results.csv").write_text(ROW + "b,audited,2,1\n")
    (tmp_path / "earlier_results.csv").write_text(ROW + "a,audited,1,1\nb,audited,1,1\n")
    head = "family,rank,place\n"
    (tmp_path / "findings.csv").write_text(head + "b,2,new second\nb,1,new\n")
    (tmp_path / "earlier_findings.csv").write_text(head + "a,1,old\nb,1,old\n")
    page = AuditPage(tmp_path)
    assert {name: row["found"] for name, row in page.families.items()} == {"a": "1", "b": "2"}
    assert page.repeated == ["b"]
    assert {name: row["place"] for name, row in page.top_findings.items()} == {
        "a": "old",
        "b": "new",
    }
