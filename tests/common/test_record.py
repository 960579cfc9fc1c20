import json

import pytest

from src.common.record import final_values, outcome, results
from tests.runs import record, train

FIELDS = {
    "schema", "status", "outcome", "study", "variant", "seed", "repeat", "config_hash", "git_sha",
    "git_dirty", "versions", "device", "vocab_size", "params_total",
    "params_active", "steps", "tokens",
    "wall_seconds", "tokens_per_second", "derived_from", "final", "best", "guard", "spikes",
    "incident",
}  # fmt: skip


def guard(first: int | None = None, tail: float = 0.0) -> dict:
    return {"first_nonfinite_step": first, "skipped_tail_frac": tail}


@pytest.mark.parametrize(
    ("expected", "facts"),
    [
        ("clean", {"guard": guard()}),
        ("intermittent", {"guard": guard(7, 0.5)}),
        ("collapsed", {"guard": guard(7, 0.51)}),
        ("collapsed", {"guard": guard(7), "weights_finite": False}),
        ("collapsed", {"guard": guard(), "val": 1.0}),
        ("stopped", {"guard": guard(7, 0.9), "stopped": True}),
    ],
)
def test_outcomes(expected, facts):
    assert outcome(**{"stopped": False, "weights_finite": True, "val": 0.0, **facts}) == expected


def test_final_values_are_those_of_the_end_and_never_older_ones():
    lines = [
        {"step": 1, "lr": 0.1, "train/loss": 4.0, "val/loss": 3.0},
        {"step": 2, "lr": 0.2},
        {"step": 3, "val/nonfinite_frac": 1.0},
    ]
    validation = {"val/nonfinite_frac": 1.0}
    assert final_values(lines, validation) == {"lr": 0.2, "val/nonfinite_frac": 1.0}


def test_a_collapsed_run_shows_no_healthy_loss(tiny, capsys):
    # Nothing is checked, so the write-up's router takes the weights down with it.
    folder = train(
        tiny,
        "ffn=moe_writeup_add",
        "model.sizes.writeup_bias_rate=400.0",
        "guard.check=[]",
        "recipe.precision=32-true",
    )
    made = record(folder)
    assert made["outcome"] == "collapsed"
    assert made["final"]["val/nonfinite_frac"] == 1.0
    assert "val/loss" not in made["final"]
    assert "train/loss" not in made["final"]
    assert "- (100% of windows non-finite)" in capsys.readouterr().out


def test_a_record_has_its_fields_and_they_say_what_happened(tiny):
    folder = train(tiny, "stability=ema", "study=named")
    made = record(folder)
    assert made.keys() >= FIELDS
    assert made["variant"].keys() == {"attention", "ffn", "stability", "model", "preset"}
    assert (made["status"], made["outcome"], made["study"]) == ("finished", "clean", "named")
    assert (made["steps"], made["tokens"]) == (12, 12 * 4 * 16)
    assert made["spikes"]["grad_norm_max"] > 0
    assert made["guard"]["skipped_steps"] == 0
    assert made["best"]["step"] in (4, 8, 12)
    assert made["final"]["val/loss"] >= made["best"]["val/loss"]
    validated = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").open()
        if "val/loss" in json.loads(line)
    ]
    # Each kind of weights has its own best validation; the last one counts, too.
    for name in ("val/loss", "val_ema/loss"):
        assert made["best"][name] == min(line[name] for line in validated)
    assert made["final"]["val/bits_per_byte"] == pytest.approx(
        made["final"]["val/loss"] / 0.693147, rel=1e-5
    )
    assert made["device"]["threads"] == 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 4, 8, 12]
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["last.ckpt"]
    assert (folder / "config.yaml").read_text().count("config_hash: " + made["config_hash"]) == 1
    assert (folder / "samples.md").read_text().startswith("# Sample")


def test_a_single_run_keeps_the_best_three_checkpoints_too(tiny):
    folder = train(tiny, "recipe.num_validations=6")
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    losses = {
        line["step"]: line["val/loss"]
        for line in map(json.loads, (folder / "metrics.jsonl").open())
        if "val/loss" in line
    }
    best = sorted(losses, key=losses.get)[:3]
    assert kept == {"last.ckpt", *(f"step-{step}.ckpt" for step in best)}


def test_a_run_that_fails_says_so_and_exits_with_1(tiny, monkeypatch, capsys):
    from src.train import main
    from src.training.task import LanguageModelTask

    def broken(self, batch, batch_idx):
        raise RuntimeError("the disk caught fire")

    monkeypatch.setattr(LanguageModelTask, "training_step", broken)
    assert main(tiny) == 1
    assert "the disk caught fire" in capsys.readouterr().err
    import pathlib

    (path,) = pathlib.Path("runs").rglob("record.json")
    made = json.loads(path.read_text())
    assert (made["status"], made["outcome"], made["steps"]) == ("failed", None, 0)
    assert "Traceback" in (path.parent / "train.log").read_text()


def test_a_summary_has_the_same_names_for_every_run_and_the_loss_of_the_weights_judged():
    made = {
        "final": {"val/loss": 3.0, "val_ema/loss": 2.0, "val_ema/nonfinite_frac": 0.0},
        "guard": {"nonfinite_steps": [7, 9], "first_nonfinite_step": 7, "skipped_steps": 2},
        "spikes": {"steps": [3], "grad_norm_max": 4.5},
        "steps": 12,
        "tokens": 768,
        "wall_seconds": 3.5,
        "tokens_per_second": 300.0,
    }
    summary = {
        "val_loss": 2.0,
        "val_nonfinite_frac": 0.0,
        "nonfinite_steps": 2,
        "first_nonfinite_step": 7,
        "skipped_steps": 2,
        "spikes": 1,
        "grad_norm_max": 4.5,
        "steps": 12,
        "tokens": 768,
        "seconds": 3.5,
        "tokens_per_second": 300.0,
    }
    assert results(made, loss="val_ema/loss") == summary
    assert results(made, loss="val/loss")["val_loss"] == 3.0
    sound = made | {"guard": {"nonfinite_steps": [], "skipped_steps": 0}}
    summary_of_sound = results(sound, loss="val_ema/loss")
    assert summary.keys() - summary_of_sound.keys() == {"first_nonfinite_step"}
    assert summary_of_sound["nonfinite_steps"] == 0
    assert results({}, loss="val/loss") == {}
    assert results({"steps": 3, "tokens_per_second": float("nan")}, loss="val/loss") == {"steps": 3}
