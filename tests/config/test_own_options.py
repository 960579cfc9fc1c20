"""Options from the folder of --config-dir: arms, names and errors follow from their values."""

from pathlib import Path

import pytest
from hydra.core.singleton import Singleton

from src.config.compose import compose
from src.config.hydra_compose import CONFIG_DIR
from src.sweep.plan import make_plan
from src.train import main

FILES = {
    "stability/clip01": "clip03: {norm: 0.1}",
    "stability/same": "clip03: {norm: 0.3}",
    "stability/both": "clip03: {norm: 0.2}\nema: {decay: 0.9, horizon_frac: null}",
    "stability/clip02": "clip02: {norm: 0.2}",
    "stability/flat": "norm: 0.2",
    "stability/empty": "# @package _global_\nrecipe: {eps: 1e-4}",
    "preset/tiny": "recipe: {max_steps: 3}",
    "preset/mistyped": "# @package _global_\nrecipe: {max_step: 3}",
    "data/mine": "max_chars: 3",
    "attention/mine": "num_kv_heads: 1",
    "model/mine": "hidden_dim: 64",
}


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "own"
    for name, text in FILES.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setenv(CONFIG_DIR, str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def test_it_is_found_after_a_job_that_a_launcher_ran_in_this_process(own):
    # As Hydra's launchers do for each job, which makes all plugins anew.
    Singleton.set_state(Singleton.get_state())
    assert "clip03@norm-0.1" in compose("train", ["stability=clip01"]).variant_name


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("stability=clip01", "clip03@norm-0.1"),
        ("stability=same", "clip03"),
        ("stability=[clip01,ema]", "clip03-ema@norm-0.1"),
        ("stability=[clip03,clip01]", "clip03@norm-0.1"),
        ("stability=[clip01,clip03]", "clip03"),
        ("stability=both", "clip03-ema@norm-0.2@decay-0.9"),
        ("stability=clip01 stability.clip03.norm=0.2", "clip03@norm-0.2"),
        ("stability=clip01 recipe.eps=1e-7", "clip03@eps-1e-07@norm-0.1"),
    ],
)
def test_a_run_is_named_after_the_values_of_a_file_as_if_they_were_typed(line, name, own):
    config = compose("train", line.split())
    assert config.variant_name == f"mlha+moe+{name}"


def test_a_file_and_the_same_typed_values_are_the_same_run(own):
    by_file = compose("train", ["stability=clip01"])
    typed = compose("train", ["stability=clip03", "stability.clip03.norm=0.1"])
    assert by_file.folder == typed.folder
    assert by_file.plain()["stability"] == typed.plain()["stability"]


def test_each_file_with_values_of_its_own_is_an_arm_of_a_sweep(own):
    plan = make_plan("train", ["stability=clip03,clip01,same", "tracking=local"])
    arms = {cell.config.variant_name: cell.config.recipe.clip_norm for cell in plan.cells}
    assert arms == {"mlha+moe+none": 1.0, "mlha+moe+clip03": 0.3, "mlha+moe+clip03@norm-0.1": 0.1}


def test_a_typed_field_of_a_remedy_reaches_each_run_whose_file_turns_it_on(own):
    typed = ["stability=ema,both,clip03", "stability.clip03.norm=0.7", "tracking=local"]
    names = [cell.config.variant_name for cell in make_plan("train", typed).cells]
    assert sorted(names) == [
        "mlha+moe+clip03-ema@norm-0.7@decay-0.9",
        "mlha+moe+clip03@norm-0.7",
        "mlha+moe+ema",
        "mlha+moe+none",
    ]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("stability=clip02", "add clip02 to REMEDIES in src/stability/__init__.py"),
        ("stability=clip02", "below its name, such as clip03: {norm: 0.1}"),
        ("stability=flat", "sets stability.norm, which does not exist"),
        ("stability=empty", "stability=empty: changes nothing"),
        ("stability=clip01 stability.clip01.norm=1", "type stability.clip03.norm"),
        ("preset=tiny", "begin the file with # @package _global_"),
        ("preset=mistyped", "sets recipe.max_step, which does not exist"),
        ("data=mine", "[/schema/data/<name>@_here_, _self_], as conf/data/shakespeare.yaml does"),
        ("attention=mine", "as conf/attention/gqa.yaml does"),
        ("model=mine", "as conf/model/proxy.yaml does"),
    ],
)
def test_a_file_that_cannot_work_is_answered_in_one_line(line, part, own, capsys):
    assert main([*line.split(), "tracking=local"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert part in error
