import math

import pytest
import torch

from src.config.compose import compose
from src.stability import RunFacts
from src.stability.zclip import ZClip, ZClipConfig
from tests.runs import record
from tests.stability.harnessed import figure, first_difference, runs

FACTS = RunFacts(max_steps=99, log_every=1, seed=0, repeat=0, clip_norm=None)


def zclip(**changes) -> ZClip:
    return ZClip(ZClipConfig(**({"alpha": 0.97, "z_max": 2.5, "warmup_steps": 4} | changes)), FACTS)


def feed(remedy: ZClip, norm: float) -> float:
    """The norm that one step's gradient has after the remedy."""
    gradient = torch.tensor([norm, 0.0])
    remedy.change([gradient], norm=torch.tensor(norm), step=1)
    return gradient.norm().item()


def warmed() -> ZClip:
    remedy = zclip()
    for norm in (0.8, 1.2, 0.8, 1.2):  # mean 1, standard deviation 0.2
        assert feed(remedy, norm) == pytest.approx(norm)
    return remedy


def test_an_outlier_is_scaled_to_the_reciprocal_of_its_score():
    remedy = warmed()
    z = (3.0 - 1.0) / 0.2
    assert feed(remedy, 3.0) == pytest.approx(1.0 + 2.5**2 / z * 0.2)
    assert remedy.num_clipped == 1


def test_what_is_within_the_band_passes_and_moves_the_mean():
    remedy = warmed()
    assert feed(remedy, 1.4) == pytest.approx(1.4)
    assert remedy.mean == pytest.approx(0.97 * 1.0 + 0.03 * 1.4)
    assert remedy.num_clipped == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", ["warming up", "warm"])
def test_one_non_finite_norm_does_not_poison_it(bad, when):
    remedy = warmed() if when == "warm" else zclip()
    before = remedy.state_dict()
    feed(remedy, bad)
    assert remedy.state_dict() == before
    for norm in (0.8, 1.2, 0.8, 1.2):
        feed(remedy, norm)
    assert feed(remedy, 50.0) < 2.0


def test_zclip_takes_the_place_of_the_fixed_bound_and_acts(tiny):
    assert compose("train", ["stability=zclip"]).recipe.clip_norm is None
    plain, treated = runs(tiny, "zclip", "stability.zclip.warmup_steps=4")
    assert first_difference(plain, treated) in (1, 2, 3)
    assert record(treated)["outcome"] == "clean"
    assert figure(treated, "stability/zclip_mean_norm")[22] > 0
    assert figure(treated, "grad/clip_frac") == {}
