"""lab power: simulated studies go through the analysis, and the tables count what they find."""

import csv

import pytest

from src.lab.__main__ import main
from src.lab.simulation import power_tables
from src.lab.simulation.power_tables import FIXED, SEQUENTIAL, Row, seeds_of_equal_power
from src.lab.simulation.simulated_study import simulate
from tests.runs import ROOT

NONE = [0.0] * 10


def test_a_cure_is_found_by_either_design_and_is_cheaper_with_looks():
    cure = [1.0, *NONE[1:]]
    fixed, looked = (simulate(design, cure, 1.0, seed=0) for design in (FIXED, SEQUENTIAL))
    assert fixed.found == looked.found == [0]
    assert fixed.num_runs == fixed.cost == 20 * 14
    # At the first look all arms but the cure have 5 of 5 failing, and are given up; ten arms ask
    # for 3 untreated runs a seed. Then one arm asks for 2, and is found.
    assert looked.num_runs == 5 * 13 + 5 * 3
    assert looked.cost == pytest.approx(10 + (5 * 12 + 5 * 2) * 0.7)


def test_the_same_seed_draws_the_same_study():
    first, again, other = (simulate(SEQUENTIAL, NONE, 0.7, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_where_nothing_fails_one_look_is_enough():
    outcome = simulate(SEQUENTIAL, NONE, 0.0, seed=0)
    assert outcome.found == [] and outcome.num_runs == outcome.cost == 5 * 13


def test_the_fixed_design_has_its_own_power():
    row = Row(design="fixed", share=0.97, prevented=0.5, studies=100, found=98, runs=1, cost=1)
    assert 17 < row.fixed_seeds < 23
    assert seeds_of_equal_power(0.0, 0.97, 0.5) < 3
    assert seeds_of_equal_power(0.9, 0.97, 0.0) is None
    # More power takes more seeds.
    assert seeds_of_equal_power(0.5, 0.97, 0.38) < seeds_of_equal_power(0.8, 0.97, 0.38)


def test_the_command_prints_and_writes_both_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(power_tables, "SHARES", (0.97,))
    monkeypatch.setattr(power_tables, "PREVENTED", (0.75,))
    assert main(["power", "studies=10", "n_jobs=1", "out=found"]) == 0
    said = capsys.readouterr().out
    assert "with a false finding" in said and "equal power" in said
    with (tmp_path / "found" / "power.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["design"], row["prevented"]) for row in rows] == [
        *(("fixed", "0.0"), ("fixed", "0.75")),
        *(("sequential", "0.0"), ("sequential", "0.75")),
    ]
    assert float(rows[3]["cost"]) < float(rows[1]["cost"]) / 2


def test_the_committed_results_keep_the_error_and_halve_the_cost():
    rows = power_tables.read(ROOT / "experiments" / "power" / "power.csv")
    null = [row for row in rows if not row.prevented]
    assert all(row.studies >= 2_000 and row.found <= 0.05 * row.studies for row in null)
    ratios = [row.cost_ratio for row in rows if row.design == "sequential" and row.prevented]
    assert len(ratios) == 3 and max(ratios) <= 0.4


def test_too_few_studies_are_refused(capsys):
    assert main(["power", "studies=3"]) == 2
    assert "studies=3: must be at least 10" in capsys.readouterr().err
