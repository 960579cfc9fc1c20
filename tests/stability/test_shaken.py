import torch

from src.config.compose import compose
from src.stability.shaken import ShakenConfig
from tests.runs import train, weights
from tests.stability.harnessed import PACE, START, first_difference, runs
from tests.stability.test_noise import added


def test_each_repeat_shakes_anew_and_otherwise_than_noise():
    config = ShakenConfig(std=1e-7, scale="absolute", start_frac=6 / 11)
    draws = [added(config, name="shaken", index=(repeat,))[0] for repeat in (0, 1)]
    draws.append(added(config)[0])
    assert not any(torch.equal(draws[a], draws[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert all(draw.abs().max() < 1e-6 for draw in draws)


def test_stability_shaken_leaves_the_baseline_at_its_start_and_by_a_hair(tiny):
    plain, shaken = runs(tiny, "shaken")
    assert first_difference(plain, shaken) in (START + 1, START + 2)
    one, two = weights(plain), weights(shaken)
    moved = [(one[n] - two[n]).abs().max().item() for n in one if one[n].is_floating_point()]
    assert 0 < max(moved) < 0.05


def test_repeats_differ_and_lie_in_folders_of_their_own(tiny):
    folders = [train(tiny, *PACE, "stability=shaken", f"repeat={repeat}") for repeat in (0, 1)]
    assert [folder.name for folder in folders] == ["seed-0", "seed-0-repeat-1"]
    assert first_difference(*folders) in (START + 1, START + 2)


def test_it_can_start_with_the_run():
    config = compose("train", ["stability=shaken", "stability.shaken.start_frac=0"])
    assert config.remedies["shaken"].start_frac == 0


def test_shaken_full_starts_with_the_run_on_a_stream_of_its_own(tiny):
    plain, shaken = runs(tiny, "shaken_full")
    assert first_difference(plain, shaken) in (1, 2)
    config = ShakenConfig(std=1e-7, scale="absolute", start_frac=0.0)
    late, full = (added(config, name=n, index=(0,))[0] for n in ("shaken", "shaken_full"))
    assert not torch.equal(late, full)
