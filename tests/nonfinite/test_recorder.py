"""The failure itself, and what the recorder makes of it."""

import json
import sys

import pytest

from nonfinite.lightning import IncidentRecorder
from src.report import main
from tests.runs import metrics, record, train


def incident_of(folder):
    (file,) = folder.glob("incidents/*/incident.json")
    return json.loads(file.read_text())


SMALLER = (
    "model.num_layers=3",
    "data.max_chars=20000",
    "recipe.seq_len=32",
    "recipe.num_validations=2",
    "recipe.val_windows=8",
)
"""None of them changes the step at which the gate fails."""
AS_IT_STANDS = pytest.param((), marks=pytest.mark.slow, id="as it stands")


@pytest.mark.parametrize("smaller", [pytest.param(SMALLER, id="smaller"), AS_IT_STANDS])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_the_additive_gate_fails_at_its_step_and_the_recorder_names_the_router(seed, smaller, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    arguments = ["preset=crash", "ffn=moe_writeup_add", "tracking=local", f"seed={seed}", *cache]
    folder = train([*arguments, *smaller])
    made = record(folder)
    # T* = 88.72 * E / (rate * (k - E * target)) = 88.72 * 5 / (4 * (2 - 1)).
    expected = 88.72 * 5 / 4
    assert abs(made["guard"]["first_nonfinite_step"] - expected) <= 2
    assert made["incident"]["step"] == made["guard"]["first_nonfinite_step"]
    assert made["incident"]["module"].endswith("ffn.router")
    assert made["incident"]["cause"] == "router underflow"
    assert "score sum of exactly 0 (0/0); mean bias -8" in made["incident"]["line"]
    assert incident_of(folder)["finding"]["operation"].endswith("div")
    assert made["outcome"] == "collapsed"


SMALLEST = (*SMALLER, "model.num_layers=2", "recipe.batch_size=4")


@pytest.mark.parametrize("smaller", [pytest.param(SMALLEST, id="smaller"), AS_IT_STANDS])
def test_with_the_correct_router_nothing_happens_in_the_same_run(smaller, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train(["preset=crash", "ffn=moe", "tracking=local", *cache, *smaller])
    assert record(folder)["incident"] is None
    assert record(folder)["outcome"] == "clean"
    assert not (folder / "incidents").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_control_fails_within_two_percent_of_its_step(seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train(["preset=control", "tracking=local", f"seed={seed}", *cache])
    step = record(folder)["guard"]["first_nonfinite_step"]
    assert step == pytest.approx(88.72 * 7 / 2.0, rel=0.02)
    assert record(folder)["incident"]["cause"] == "router underflow"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_additive_gate_at_stress_length_fails_within_two_percent_of_its_step(seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    arguments = ["preset=stress", "tracking=local", f"seed={seed}", "recipe.max_steps=440", *cache]
    folder = train([*arguments, "ffn=moe_writeup_add"])
    step = record(folder)["guard"]["first_nonfinite_step"]
    assert step == pytest.approx(88.72 * 5 / 1.785, rel=0.02)
    incident = record(folder)["incident"]
    assert incident["step"] == step
    assert incident["module"].endswith("ffn.router")
    assert "score sum of exactly 0 (0/0)" in incident["line"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["stress", "control"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_the_correct_router_no_incident_comes_at_that_length(preset, seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train([f"preset={preset}", "ffn=moe", "tracking=local", f"seed={seed}", *cache])
    assert record(folder)["incident"] is None
    assert record(folder)["outcome"] == "clean"


FAILING = (
    "ffn=moe_writeup_add",
    "recipe.precision=32-true",
    "model.sizes.writeup_bias_rate=400.0",
)


def test_the_recorder_changes_nothing_of_the_run(tiny, monkeypatch):
    watched = train(tiny, *FAILING, "study=watched")
    monkeypatch.setattr(IncidentRecorder, "_observe", lambda *args: None)
    blind = train(tiny, *FAILING, "study=blind")
    assert metrics(watched) == metrics(blind)
    assert record(watched)["guard"] == record(blind)["guard"]
    assert record(watched)["incident"] is not None


def test_one_line_is_shown_and_a_page_without_outside_parts_is_written(tiny, capsys):
    folder = train(tiny, *FAILING)
    made = record(folder)
    assert made["incident"]["line"] in capsys.readouterr().err
    (page,) = folder.glob("incidents/*/incident.html")
    text = page.read_text()
    assert "router underflow" in text
    assert "src=" not in text
    assert "<svg" in text or made["incident"]["step"] == 1
    assert {file.name for file in page.parent.iterdir()} == {
        "incident.html",
        "incident.json",
        "state.pt",
    }


def test_under_accumulation_the_micro_batch_that_failed_is_found(tiny):
    folder = train(tiny, *FAILING, "recipe.accumulate=3")
    assert record(folder)["incident"]["cause"] == "router underflow"


def test_a_recorder_that_fails_says_so_and_the_run_goes_on(tiny, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("nonfinite.lightning.recorder.trace", full)
    folder = train(tiny, *FAILING)
    assert record(folder)["steps"] == 12
    assert record(folder)["incident"]["cause"] == "unknown"
    assert "could not be recorded (OSError: no space left)" in capsys.readouterr().err


@pytest.mark.parametrize("broken", ["write_page", "torch.save"])
def test_what_cannot_be_written_beside_it_does_not_erase_the_diagnosis(
    broken, tiny, monkeypatch, capsys
):
    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        if broken == "write_page":
            patch.setattr("nonfinite.recording.write_page", fails)
        else:
            patch.setattr("nonfinite.lightning.recorder.torch.save", fails)
            # Checkpoints are saved by the same function, and are not what fails here.
            patch.setattr("src.training.checkpoint_writer.save", lambda trainer, path: path.touch())
        folder = train(tiny, *FAILING)
    assert record(folder)["incident"]["cause"] == "router underflow"
    assert incident_of(folder)["cause"] == "router underflow"
    (place,) = folder.glob("incidents/step-*")
    assert (place / "state.pt").is_file() == (broken == "write_page")
    error = " ".join(capsys.readouterr().err.split())
    assert ("the page could not" in error) == (broken == "write_page")
    assert ("cannot be rerun later: its state could not be saved" in error) != (
        broken == "write_page"
    )
    assert main([f"study={folder.parts[-3]}"]) == 0
    assert "router underflow" in (folder.parents[1] / "report" / "report.csv").read_text()


def test_without_altair_the_page_is_written_without_curves(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    folder = train(tiny, *FAILING)
    (page,) = folder.glob("incidents/step-*/incident.html")
    assert "Install altair" in page.read_text()
    assert record(folder)["incident"]["line"].split(":")[0] in page.read_text()
