"""What the laboratory book says is what its results say."""

import csv
from pathlib import Path
from statistics import fmean, median

import pytest

from tests.runs import ROOT

STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/README.md"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_says_how_it_is_repeated_and_has_its_results(study):
    text = (study / "README.md").read_text()
    for part in ("**Question.**", "**Command.**", "**Machine and cost.**", "**Answer.**"):
        assert part in text
    assert (study / "results.csv").is_file()
    for drawing in (study / "figures").glob("*.svg"):
        assert drawing.name in text


def failing(name: str) -> dict[str, list[int]]:
    """Non-finite batches of each arm's seeds, counted from where it acts."""
    with (ROOT / "experiments" / name / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    arms: dict[str, list[int]] = {}
    for row in rows:
        arms.setdefault(row["label"], []).append(int(row["nonfinite_batches_after"]))
    return arms


def test_the_numbers_of_ablate_are_those_of_its_results():
    arms = failing("ablate")
    seeds = {arm: sum(count > 0 for count in counts) for arm, counts in arms.items()}
    assert all(len(counts) == 6 for counts in arms.values())
    assert (seeds["none@preset-stress"], seeds["none@preset-stress_bf16"]) == (6, 5)
    assert seeds["router_eps"] == 0
    assert {seeds[arm] for arm in ("clip03", "clip05", "clip_value", "warmdown")} == {6}
    assert {seeds[arm] for arm in ("noise", "lower_lr", "fp32")} == {5}
    assert seeds["fp32_full"] == 6
    shaken = ("shaken_full", "shaken@preset-stress", "shaken@preset-stress_bf16")
    assert sorted(seeds[arm] for arm in shaken) == [4, 5, 5]
    assert arms["fp32_full"] == arms["none@preset-stress"] == [140, 21, 4, 63, 52, 18]
    text = (Path(ROOT) / "experiments" / "ablate" / "README.md").read_text()
    assert "140, 21, 4, 63, 52 and 18" in text


ARMS = {
    "scratch": "sizes alone",
    "exact": "exact",
    "kv96": "kv96",
    "kv48": "kv48",
    "kv24": "kv24",
}


@pytest.mark.parametrize(("study", "num_seeds"), [("convert", 6), ("convert_smollm2", 2)])
def test_the_numbers_of_conversions_are_those_of_their_results(study, num_seeds):
    with (ROOT / "experiments" / study / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "experiments" / study / "README.md").read_text()
    losses = {}
    for name, label in ARMS.items():
        own = [row for row in rows if row["init"] == f"models/{study}/{name}"]
        assert len(own) == num_seeds
        before, losses[name] = (
            [float(row[key]) for row in own] for key in ("initial_loss", "loss")
        )
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[4] == f"{int(own[0]['cache_bytes_per_token']):,}"
        assert cells[5] == f"{fmean(before):.3f}" and cells[6] == f"{fmean(losses[name]):.3f}"
    for name in ("exact", "kv96", "kv48", "kv24"):
        assert all(one > other for one, other in zip(losses["scratch"], losses[name], strict=True))
    gaps = {name: fmean(losses[name]) - fmean(losses["exact"]) for name in losses}
    if study == "convert":
        assert 0.21 <= round(gaps["scratch"], 2) <= 0.22
    else:
        assert [round(gaps[name], 2) for name in ("kv96", "kv24")] == [0.26, 0.63]
        for pair in zip(*(losses[name] for name in ("exact", "kv96", "kv48", "kv24")), strict=True):
            assert list(pair) == sorted(pair)


def test_the_numbers_of_detector_are_those_of_its_results():
    with (ROOT / "experiments" / "detector" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "experiments" / "detector" / "README.md").read_text()
    unseen = [row for row in rows if row["half"] == "unseen"]
    healthy = [row for row in unseen if row["kind"] == "healthy"]
    failed = [row for row in unseen if row["kind"] != "healthy" and row["first_nonfinite"]]
    assert f"| false alarms in healthy runs | 0 of {len(healthy)} |" in text
    assert not any(row["alarm_step"] or row["first_nonfinite"] for row in healthy)
    right = [row["cause_right"] for row in failed]
    assert f"| cause right | {right.count('True')} of {len(failed)} |" in text
    leads: dict[str, list[int]] = {}
    for row in failed:
        if row["kind"] == "drift":
            lead = int(row["first_nonfinite"]) - int(row["alarm_step"] or row["first_nonfinite"])
            leads.setdefault(row["case"], []).append(lead)
    every = [lead for case in leads.values() for lead in case]
    warned = sum(lead > 0 for lead in every)
    assert f"| drifting failures warned of | {warned} of {len(every)} |" in text
    assert (
        f"| median lead, share of the run | {median(every) / 130:.0%} |".replace("%", " %") in text
    )
    for case, own in leads.items():
        assert f"| {case} | {len(own)} of 6 | {median(own):g} |" in text


def test_the_ratios_of_speed_are_those_of_its_results():
    folder = ROOT / "experiments" / "speed"
    text = (folder / "README.md").read_text()
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measured_by"] == "peers script"]

    def best(rows, name, column="value", pick=max):
        """Ours over the best of the others."""
        ours = next(float(row[column]) for row in rows if row["name"] == name)
        others = [float(r[column]) for r in rows if r["name"] not in (name, "floor")]
        return ours / pick(others)

    for shape in ("proxy", "mid"):
        for cell in ("gqa+mlp", "mlha+moe"):
            here = [r for r in rows if (r["shape"], r["cell"]) == (shape, cell)]
            for kind in ("eager", "compiled"):
                steps = [
                    r
                    for r in here
                    if r["task"] == "step" and r["name"].endswith("compiled") == (kind != "eager")
                ]
                name = "ours" if kind == "eager" else "ours compiled"
                line = next(x for x in text.splitlines() if f"{kind} step, {shape}, {cell}" in x)
                assert f"{best(steps, name):.2f}" in line
                assert (
                    f"{next(float(r['of_floor']) for r in steps if r['name'] == name):.2f}" in line
                )
            if shape == "mid":
                decoding = [r for r in here if r["task"] == "decode"]
                line = next(x for x in text.splitlines() if f"greedy decoding, mid, {cell}" in x)
                assert f"{best(decoding, 'ours'):.2f}" in line
    memory = next(x for x in text.splitlines() if "peak memory, proxy" in x)
    for cell in ("gqa+mlp", "mlha+moe"):
        here = [
            r
            for r in rows
            if (r["shape"], r["cell"], r["task"]) == ("proxy", cell, "step")
            and not r["name"].endswith("compiled")
        ]
        assert f"{best(here, 'ours', 'peak_mib', min):.2f}" in memory
