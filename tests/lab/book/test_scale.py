"""What a study would cost elsewhere: its jobs, how they are shared out, measured speeds."""

import dataclasses
import json

import pytest

from src.lab.book.files import study_named
from src.lab.book.scale import described, makespan, measured, num_states, waves
from src.sweep.plan import make_plan


def test_jobs_are_shared_out_wave_after_wave():
    jobs = [[1.0, 1.0], [0.5, 0.5, 0.5, 0.25]]
    assert makespan(jobs, num_devices=1) == 3.75
    # The second wave waits for the first: half, half, and a half and a quarter after them.
    assert makespan(jobs, num_devices=2) == 2.0
    assert makespan(jobs, num_devices=64) == 1.5


def test_the_shares_of_the_committed_study_are_those_of_its_plan():
    arms = "experiment=stability", "stability=none,clip03,warmdown,early_stop", "repeat=0"
    plan = make_plan("train", [*arms, "seed=1000,1001"])
    planned = [
        sorted(cell.own_steps / cell.config.recipe.max_steps for cell in wave)
        for wave in plan.waves()
    ]
    study = study_named("stability").study
    names = {cell.config.variant_name for cell in plan.cells}
    runs = [run for run in study.runs if run.variant in names and run.seed in (1000, 1001)]
    study = dataclasses.replace(study, runs=runs)
    starts = {(cell.config.seed, cell.first_step) for cell in plan.cells if cell.first_step}
    assert num_states(study) == len(starts)
    assert [sorted(wave) for wave in waves(study)] == planned


def test_hours_and_speeds_agree_with_each_other():
    model = described("smollm2_135m")
    speed = model.tokens_per_second(0.5, flops=1e15)
    tokens = 11_000 * 4 * 512
    assert model.hours(speed) == pytest.approx(tokens * model.size.flops_per_token / 5e14 / 3600)


def test_what_was_measured_on_a_gpu_is_found(tmp_path):
    assert measured(tmp_path, shape="proxy") == []
    (tmp_path / "scale").mkdir()
    cases = [("proxy", "cuda"), ("proxy", "cpu"), ("mid", "cuda")]
    lines = [json.dumps({"case": {"shape": s, "device": d}}) for s, d in cases]
    (tmp_path / "scale" / "speed.jsonl").write_text("\n".join(lines) + "\n")
    (row,) = measured(tmp_path, shape="proxy")
    assert row["case"]["device"] == "cuda"
