import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from src.data.batches import TrainBatches
from src.stability import AdaGCConfig, EmaConfig, RunFacts, SpikeSkipConfig
from src.stability.muon import MuonConfig
from src.stability.rewind import Rewind, RewindConfig
from src.train import main
from tests.runs import assert_same_run, assert_same_tree, record, stop_after, train
from tests.stability.harnessed import PACE, figure, first_difference, runs
from tests.stability.resumed import (
    Jolt,
    assert_absent,
    assert_resumed_is_whole,
    assert_sharded_is_refused,
)
from tests.training.harness import TEXT, Harness, Poison, guard_config, recipe_config, snapshot

FACTS = RunFacts(max_steps=80, log_every=1, seed=0, repeat=0, clip_norm=1.0)
FAILS = [
    *("ffn=moe_writeup_add", "model.sizes.writeup_bias_rate=400.0", "recipe.precision=32-true")
]
SHORT = [f"stability.rewind.{f}" for f in ("back_steps=2", "every=1", "max_rewinds=3")]
VALUES = {"sigmas": 6.0, "back_steps": 5, "every": 3, "max_rewinds": 20}


@pytest.fixture(autouse=True)
def _spikes_are_judged_from_the_eighth_step(monkeypatch):
    """In place of the 64th, so that runs are short."""
    monkeypatch.setattr("nonfinite.lightning.spikes.LEAST", 8)


def rewind(**changes) -> Rewind:
    (callback,) = RewindConfig(**(VALUES | changes)).callbacks(FACTS)
    return callback


def ema() -> pl.Callback:
    (callback,) = EmaConfig(decay=0.9, horizon_frac=None).callbacks(FACTS)
    return callback


class Seen(pl.Callback):
    """The batches and learning rates of every step, and the state before the first."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.rates: list[float] = []

    def on_train_start(self, trainer, pl_module) -> None:
        self.initial = snapshot(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batches.append(batch[0].clone())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def harness(*callbacks: pl.Callback, guard: dict | None = None, **recipe) -> Harness:
    values = {"max_steps": 14, "learning_rate": 1e-3} | recipe
    return Harness(
        recipe=recipe_config(**values),
        guard=guard_config(**(guard or {})),
        callbacks=list(callbacks),
    ).fit()


@pytest.mark.parametrize("first", ["ema", "rewind"])
def test_at_a_spike_all_state_is_that_of_the_snapshot(first, capsys):
    """Step 14 is the spike; the newest snapshot that is five steps older is that of step 9."""
    back, seen = rewind(), Seen()
    pair = [ema(), back] if first == "ema" else [back, ema()]
    run = harness(Jolt(14), *pair, seen, max_steps=18, clip_norm=None, schedule="linear")
    assert_same_tree(run.states[13], run.states[8])
    assert run.states[12]["averages"] and run.states[8]["optimizer"]
    # The weights move on from there, by other batches than before.
    assert not torch.equal(
        run.states[14]["weights"]["model.embedding.weight"],
        run.states[9]["weights"]["model.embedding.weight"],
    )
    assert back.num_rewinds == 1
    assert back.num_undone == 5
    assert run.recorder.lines[13]["stability/rewind_rewinds"] == 0
    assert run.recorder.lines[14]["stability/rewind_rewinds"] == 1
    assert run.recorder.lines[14]["stability/rewind_undone_steps"] == 5
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "step 14: spike of gradient norm; training goes on from the state of step 9 with the batch"
        " of step 15 (rewind 1 of 20)" in said
    )
    # Step numbers, batches and rates go on as without it.
    batches = TrainBatches(TEXT, seed=0, batch_size=2, seq_len=8)
    assert_same_tree(seen.batches, [batches.batch(index)[0] for index in range(18)])
    assert seen.rates == pytest.approx([1e-3 * run.recipe.lr_factor(step) for step in range(18)])
    # It is no non-finite step, and the guard's count does not call it one.
    assert run.step_guard.summary()["skipped_steps"] == 0


def test_the_step_after_is_one_of_the_snapshots_state_on_the_next_batch():
    run = harness(Jolt(14), rewind(), max_steps=15, clip_norm=None)
    other = Harness(recipe=run.recipe)
    state = run.states[8]
    other.task.load_state_dict(state["weights"])
    optimizer = other.task.configure_optimizers()["optimizer"]
    for parameter, moments in zip(
        optimizer.param_groups[0]["params"], state["optimizer"].values(), strict=True
    ):
        optimizer.state[parameter] = {n: value.clone() for n, value in moments.items()}
    batch = TrainBatches(TEXT, seed=0, batch_size=2, seq_len=8).batch(14)
    other.task.training_step(batch, 0).backward()
    optimizer.step()
    for name, parameter in other.task.named_parameters():
        assert torch.equal(parameter, run.states[14]["weights"][name]), name


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("check", [["loss", "gradients"], []])
def test_a_non_finite_step_goes_back_whether_the_guard_skips_it_or_not(what, check):
    back = rewind()
    run = harness(Poison({12}, what=what), back, guard={"check": check})
    assert back.num_rewinds == 1
    assert_same_tree(run.states[11], run.states[5])
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_weights_that_an_update_spoilt_go_back_too():
    class Spoil(pl.Callback):
        """As an optimizer that divides by zero."""

        def on_train_start(self, trainer, pl_module):
            def spoil(optimizer, *_):
                if trainer.global_step + 1 == 9:
                    guard.finite = False
                    with torch.no_grad():
                        optimizer.param_groups[0]["params"][0].fill_(math.nan)

            trainer.optimizers[0].register_step_post_hook(spoil)

    back = rewind()
    run = Harness(recipe=recipe_config(max_steps=12), callbacks=[Spoil(), ema(), back])
    guard = run.step_guard
    run.fit()
    assert back.num_rewinds == 1
    assert_same_tree(run.states[8], run.states[2])


def test_early_in_a_run_it_goes_back_to_the_beginning():
    back, seen = rewind(), Seen()
    run = harness(seen, Poison({2, 4}, what="gradient"), ema(), back)
    for step in (2, 4):
        assert_same_tree(run.states[step - 1], seen.initial)
    assert seen.initial["optimizer"] == {}
    # Step 3 alone was made between the two, and the fourth was dropped.
    assert (back.num_rewinds, back.num_undone) == (2, 4)


def test_spikes_in_a_row_go_back_to_the_same_snapshot_which_has_not_changed():
    back = rewind()
    run = harness(Poison({12, 13}, what="gradient"), back)
    assert_same_tree(run.states[11], run.states[5])
    assert_same_tree(run.states[12], run.states[5])
    assert (back.num_rewinds, back.num_undone) == (2, 7)


def test_after_the_last_rewind_the_guard_alone_acts():
    back = rewind(max_rewinds=2)
    run = harness(Poison({8, 10, 12}, what="gradient"), back)
    assert back.num_rewinds == 2
    assert run.step_guard.summary()["skipped_steps"] == 3
    assert_same_tree(run.states[11], run.states[10])


def test_no_more_snapshots_are_held_than_the_configuration_says():
    back = rewind()
    run = harness(back, max_steps=30)
    counts = [run.recorder.lines[n]["stability/rewind_snapshots"] for n in range(1, 31)]
    assert max(counts) == back.config.num_snapshots == 3
    # From step 30 it would go back to at least step 25, so to the snapshot of step 24.
    assert [s["step"] for s in back.snapshots] == [21, 24, 27]


def test_the_state_after_a_rewind_is_not_kept_as_a_later_one():
    """It is the snapshot's, and as that it is held already."""
    back = rewind()
    harness(Poison({9}, what="gradient"), back, max_steps=13)
    assert back.num_rewinds == 1
    assert [s["step"] for s in back.snapshots] == [3, 12]


def test_the_window_goes_back_too():
    back = rewind()
    harness(Jolt(14), back, max_steps=14, clip_norm=None)
    assert back.scores["norm"].num_values == 9
    assert len(back.scores["loss"].window) == 9


def test_without_spikes_rewind_is_the_baseline(tiny):
    run = assert_absent(rewind(), max_steps=12)
    assert run.recorder.lines[12]["stability/rewind_rewinds"] == 0
    plain, treated = runs(tiny, "rewind")
    assert first_difference(plain, treated) is None
    assert set(figure(treated, "stability/rewind_rewinds").values()) == {0.0}


def others() -> list[pl.Callback]:
    adagc = AdaGCConfig(max_norm=1.0, ratio=1.05, beta=0.9, warmup_steps=3)
    return [*adagc.callbacks(FACTS), ema(), *SpikeSkipConfig(sigmas=6.0).callbacks(FACTS)]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop_at", [7, 10, 12])
def test_interrupted_and_resumed_is_uninterrupted(accumulate, stop_at, tmp_path):
    """Between snapshot and spike, in the step of the spike, and after it, with other remedies."""
    whole = assert_resumed_is_whole(
        lambda: [Poison({10, 13}, what="gradient"), *others(), rewind()],
        tmp_path / "s.ckpt",
        stop_at=stop_at,
        recipe={"max_steps": 16, "accumulate": accumulate, "clip_norm": None},
    )
    lines = whole.recorder.lines
    assert [lines[n]["stability/rewind_rewinds"] for n in (9, 10, 13, 16)] == [0, 1, 2, 2]
    # Steps are optimizer steps: step 10 goes back to step 3.
    ends = [accumulate * step - 1 for step in (3, 10)]
    assert_same_tree(*(whole.states[end] for end in ends))


def test_state_of_other_remedies_goes_back():
    adagc, skip = others()[0], others()[2]
    kept = {}

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            kept[trainer.global_step] = (
                adagc.state_dict()["gamma"].clone(),
                skip.state_dict()["scores"],
            )

    harness(Poison({10}, what="loss"), adagc, skip, rewind(), Keep(), clip_norm=None)
    assert_same_tree(kept[10], kept[3])
    assert not torch.equal(kept[9][0], kept[3][0])


def test_an_optimizer_with_two_rules_goes_back():
    config = MuonConfig(momentum=0.9, num_iterations=5, update_rms=0.2)
    run = Harness(
        recipe=recipe_config(max_steps=9),
        callbacks=[Poison({8}, what="gradient"), rewind()],
        replace_optimizer=config.replace_optimizer,
    ).fit()
    assert_same_tree(run.states[7], run.states[2])
    assert any("momentum_buffer" in s for s in run.states[7]["optimizer"].values())


def test_rewind_acts_on_a_run_that_fails(tiny, capsys):
    folder = train(tiny, *PACE, *FAILS, "stability=rewind", *SHORT)
    assert figure(folder, "stability/rewind_rewinds")[22] == 3
    assert record(folder)["steps"] == 22
    assert "(rewind 3 of 3)" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_run_that_goes_back_survives_interruptions(tiny, monkeypatch):
    arguments = [*tiny, *PACE, *FAILS, "stability=[ema,rewind]", *SHORT]
    # An incident names its own folder, which differs.
    arguments += ["recipe.accumulate=2", "watch.incidents=false"]
    whole = train(arguments, "study=whole")
    rewinds = figure(whole, "stability/rewind_rewinds")
    first = next(step for step, number in rewinds.items() if number > 0)
    for step in (first - 1, first, first + 1):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert main([*arguments, "study=stopped"]) == 143
    assert main([*arguments, "study=stopped"]) == 0
    (folder,) = Path("runs/stopped").glob("*/seed-0")
    assert_same_run(whole, folder)


def test_the_reason_says_which_value_spiked_and_which_was_not_finite(monkeypatch):
    """A loss can spike, and stay finite, in a step whose gradient norm overflows."""
    values = {"loss": [*[1.0, 1.1] * 8, 9.0], "norm": [*[1.0, 1.1] * 8, math.inf]}
    back = rewind()
    for loss, norm in zip(*values.values(), strict=True):
        guard = SimpleNamespace(
            loss=torch.tensor(loss), grad_norm=torch.tensor(norm), applied=False
        )
        monkeypatch.setattr(back, "guard_of", lambda _, guard=guard: guard)
        back.on_before_optimizer_step(None, None, None)
    assert back._reason == "spike of loss and non-finite gradient norm"


@pytest.mark.parametrize(
    ("field", "why"),
    [
        ("guard.on_nonfinite=stop", r"needs guard.on_nonfinite=skip; it is stop"),
        ("guard.on_nonfinite=raise", r"needs guard.on_nonfinite=skip; it is raise"),
        ("guard.max_consecutive=1", r"needs guard.max_consecutive of at least 2, or null; it is 1"),
    ],
)
def test_a_guard_that_ends_the_run_first_is_refused(field, why):
    with pytest.raises(InputError, match=rf"^stability.rewind.max_rewinds=20: {why}"):
        compose("train", ["stability=rewind", field])


def test_what_it_cannot_work_with_is_refused():
    trainer = pl.Trainer(callbacks=[rewind()], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="rewind needs a StepGuard"):
        rewind().on_train_start(trainer, None)
    with pytest.raises(ValueError, match=r"max_rewinds=20: needs guard.on_nonfinite=skip"):
        harness(rewind(), guard={"on_nonfinite": "stop"})
    for name in ("back_steps", "every", "max_rewinds"):
        with pytest.raises(ValueError, match=f"^{name}=0: must be at least 1"):
            rewind(**{name: 0})


def test_sharded_tensors_are_refused():
    back = rewind()
    back.guard_of = lambda _: Harness().step_guard
    assert_sharded_is_refused(back, "rewind")
