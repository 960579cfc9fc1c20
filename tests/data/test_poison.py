import numpy as np
import pytest
import torch
import yaml

from src.data import PoisonConfig
from src.data.batches import TrainBatches
from src.train import main
from tests.runs import assert_same_run, made, metrics, stop_after, train

TOKENS = np.arange(1000, dtype=np.uint16)


def poison(**changes):
    values = {"kind": "repeats", "first_step": 3, "num_steps": 2, "every": None}
    return PoisonConfig(**({**values, "repeated_tokens": 4} | changes))


def batches(**changes):
    return TrainBatches(TOKENS, **({"seed": 0, "batch_size": 4, "seq_len": 10} | changes))


def spoilt_steps(given, *, last=12):
    return [step for step in range(1, last + 1) if given.spoils(step)]


def test_a_stretch_of_steps_is_spoilt_once_or_again_and_again():
    assert spoilt_steps(poison()) == [3, 4]
    assert spoilt_steps(poison(every=4)) == [3, 4, 7, 8, 11, 12]
    assert spoilt_steps(poison(kind="none", every=4)) == []


def test_only_the_micro_batches_of_a_spoilt_step_are_spoilt():
    clean, spoilt = batches(accumulate=2), batches(accumulate=2, poison=poison())
    differ = [
        index
        for index in range(12)
        if not all(map(torch.equal, clean.batch(index), spoilt.batch(index)))
    ]
    assert differ == [4, 5, 6, 7]


def test_a_repeating_row_repeats_its_first_tokens_in_inputs_and_targets():
    inputs, targets = batches(poison=poison()).batch(2)
    clean, _ = batches().batch(2)
    assert torch.equal(inputs, clean[:, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    assert torch.equal(targets, clean[:, [1, 2, 3, 0, 1, 2, 3, 0, 1, 2]])


def test_shifted_labels_are_one_more_token_ahead():
    inputs, targets = batches(poison=poison(kind="shifted_labels")).batch(2)
    clean, _ = batches().batch(2)
    assert torch.equal(inputs, clean)
    assert torch.equal(targets[:, :-1], clean[:, :-1] + 2)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"kind": "swapped"}, "kind=swapped"),
        ({"first_step": 0}, "first_step=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"repeated_tokens": 0}, "repeated_tokens=0"),
        ({"every": 2}, "every=2"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, field):
    with pytest.raises(ValueError, match=field):
        poison(**wrong)


POISON = ["poison.kind=repeats", "poison.first_step=4", "poison.num_steps=2"]


def config_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_run_is_the_clean_one_until_its_first_spoilt_batch(tiny):
    """And one that spoils nothing is the clean one, folder and record included."""
    clean = made(tiny, "recipe.log_every=1")
    spoilt = train(tiny, "recipe.log_every=1", *POISON, "study=spoilt")
    losses = [[line["train/loss"] for line in metrics(run)][:12] for run in (clean, spoilt)]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3]
    assert config_of(clean)["poison"] == {}
    assert config_of(spoilt)["poison"]["first_step"] == 4


def test_a_run_stopped_among_spoilt_batches_and_resumed_equals_one_that_was_not(tiny, monkeypatch):
    whole = train(tiny, *POISON, "study=whole")
    arguments = [*tiny, *POISON, "study=stopped"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert main(arguments) == 143
    assert main(arguments) == 0
    assert_same_run(whole, whole.parents[2] / "stopped" / whole.parents[0].name / "seed-0")
