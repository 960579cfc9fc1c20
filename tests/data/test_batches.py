import numpy as np
import pytest
import torch

from src.data.batches import TrainBatches, ValBatches

TOKENS = np.arange(1000, dtype=np.uint16)


def train(**changes):
    values = {"seed": 0, "batch_size": 4, "seq_len": 8} | changes
    return TrainBatches(TOKENS, **values)


def test_targets_are_the_next_tokens():
    inputs, targets = train().batch(3)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs + 1, targets)


def test_what_is_written_into_the_inputs_is_not_in_the_targets():
    inputs, targets = train().batch(3)
    kept = targets.clone()
    inputs.zero_()
    assert torch.equal(targets, kept)


def test_any_step_can_be_built_without_the_ones_before_it():
    iterator = iter(train())
    in_order = [next(iterator) for _ in range(6)]
    assert torch.equal(train().batch(5)[0], in_order[5][0])
    begun_later = next(iter(train(first=lambda: 5)))
    assert torch.equal(begun_later[0], in_order[5][0])


def test_steps_and_seeds_differ():
    first = train().batch(0)[0]
    assert not torch.equal(first, train().batch(1)[0])
    assert not torch.equal(first, train(seed=1).batch(0)[0])


def test_ranks_share_the_rows_that_one_process_has():
    ranks = [train(rank=rank, world_size=2).batch(7)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(ranks), train().batch(7)[0])
    with pytest.raises(ValueError, match="batch_size=4: must be a multiple of 3"):
        train(world_size=3)


def test_every_window_is_possible_and_none_beyond_the_end():
    starts = torch.cat([train(batch_size=500).batch(i)[0][:, 0] for i in range(40)])
    assert starts.min() == 0
    assert starts.max() == 1000 - 8 - 1


def test_validation_windows_lie_side_by_side():
    batches = ValBatches(TOKENS, batch_size=10, seq_len=8, max_windows=None)
    windows = torch.cat([inputs for inputs, _ in batches])
    assert len(batches) == 13
    assert torch.equal(windows.flatten(), torch.arange(124 * 8))


def test_limited_validation_windows_are_spread_evenly():
    batches = ValBatches(TOKENS, batch_size=2, seq_len=8, max_windows=5)
    starts = torch.cat([inputs for inputs, _ in batches])[:, 0]
    assert len(starts) == 5
    assert starts[0] == 0
    assert starts[-1] == 123 * 8
