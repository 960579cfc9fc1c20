"""Two public tables of runs by seed, with what their authors could have concluded from them.

proof_cost.csv: the cost of proofs with two versions of a verifier's prelude, and with the first
version again under another name (a placebo, that is an A/A control), from a published report of
such a comparison. waveform_f1.csv: five classifiers of waveforms, from a published list of final
results by seed.
"""

import csv
from pathlib import Path

import pytest

from src.report import main

TABLES = Path(__file__).parent / "public_tables"


def compare(folder, monkeypatch, *arguments) -> dict[str, dict[str, str]]:
    """The rows of arms.csv, by arm."""
    monkeypatch.chdir(folder)
    assert main([*arguments, "seed=seed"]) == 0
    with (folder / "comparison" / "arms.csv").open() as file:
        return {row["arm"]: row for row in csv.DictReader(file)}


def test_the_placebo_as_a_second_control_finds_what_one_control_cannot(tmp_path, monkeypatch):
    proofs = (f"csv={TABLES / 'proof_cost.csv'}", "arm=prelude", "endpoint=resource_units")
    alone = compare(tmp_path, monkeypatch, *proofs, "control=master")
    assert float(alone["pr"]["values_p_value"]) == pytest.approx(2 * 8 / 2**8)
    assert "cannot tell" in alone["pr"]["values_verdict"]
    assert "cannot tell" in alone["placebo"]["values_verdict"]
    assert float(alone["placebo"]["values_difference"]) == pytest.approx(3.7)

    both = compare(tmp_path, monkeypatch, *proofs, "control=[master,placebo]")
    assert float(both["pr"]["values_p_value"]) < 0.005
    assert both["pr"]["values_verdict"].startswith("higher, by 61.075")


def test_five_seeds_and_one_control_find_nothing_however_large_the_difference(
    tmp_path, monkeypatch
):
    arms = compare(
        tmp_path,
        monkeypatch,
        f"csv={TABLES / 'waveform_f1.csv'}",
        "arm=model",
        "endpoint=macro_f1",
        "control=Classical Ensemble",
    )
    assert float(arms["MGCNN-SDTransformer"]["values_difference"]) == pytest.approx(-4.932)
    # On all five seeds it is worse, and so could five coins fall: 2 in 32, for each of four arms.
    assert float(arms["MGCNN-SDTransformer"]["values_p_value"]) == pytest.approx(4 * 2 / 2**5)
    for name, arm in arms.items():
        if name != "Classical Ensemble":
            assert "with so few runs no difference can be significant" in arm["values_verdict"]
