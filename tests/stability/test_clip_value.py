import pytest
import torch

from src.stability import RunFacts
from src.stability.clip_value import ClipValue, ClipValueConfig
from tests.stability.harnessed import figure, first_difference, runs

FACTS = RunFacts(max_steps=10, log_every=1, seed=0, repeat=0, clip_norm=1.0)


def clipped(config: ClipValueConfig, gradients: list[torch.Tensor]) -> ClipValue:
    remedy = ClipValue(config, FACTS)
    assert remedy.change(gradients, norm=torch.tensor(1.0), step=1)
    return remedy


def test_the_literal_form_bounds_every_entry():
    gradient = torch.tensor([-3.0, 0.001, 0.02, 0.5])
    remedy = clipped(ClipValueConfig(value=0.01, scale="absolute"), [gradient])
    torch.testing.assert_close(gradient, torch.tensor([-0.01, 0.001, 0.01, 0.01]))
    assert float(remedy.figures["frac"]) == 0.75


def test_the_matched_form_follows_the_scale_of_each_tensor():
    small, large = torch.full((100,), 1e-4), torch.full((100,), 10.0)
    small[0], large[0] = 1e-2, 1e3
    clipped(ClipValueConfig(value=5.0, scale="gradient_rms"), [small, large])
    # One entry is a hundred times the others: the RMS is a tenth of it, and a little more.
    rms = ((1e-2**2 + 99 * 1e-4**2) / 100) ** 0.5
    assert small[0].item() == pytest.approx(5 * rms, rel=1e-4)
    assert large[0].item() == pytest.approx(5 * rms * 1e5, rel=1e-4)
    assert torch.equal(small[1:], torch.full((99,), 1e-4))


def test_clip_value_acts_before_norm_clipping_and_says_how_often(tiny):
    plain, treated = runs(tiny, "clip_value", "stability.clip_value.value=0.001")
    assert first_difference(plain, treated) in (1, 2)
    assert 0 < figure(treated, "stability/clip_value_frac")[22] < 1
    # What norm clipping sees is smaller, so that it binds less often.
    assert sum(figure(treated, "grad/clip_frac").values()) <= sum(
        figure(plain, "grad/clip_frac").values()
    )


def test_a_bound_that_never_binds_is_the_baseline(tiny):
    plain, treated = runs(tiny, "clip_value", "stability.clip_value.value=1e6")
    # The norm is taken anew after the remedy, from the same gradients.
    assert first_difference(plain, treated) is None
    assert set(figure(treated, "stability/clip_value_frac").values()) == {0.0}
