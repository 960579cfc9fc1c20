import math

import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from src.stability import RunFacts
from src.stability.noise import GradientNoise, NoiseConfig
from tests.runs import record
from tests.stability.harnessed import START, figure, first_difference, runs

FACTS = RunFacts(max_steps=11, log_every=1, seed=0, repeat=0, clip_norm=0.5)


def added(
    config: NoiseConfig, *, step: int = 7, name: str = "noise", index=()
) -> list[torch.Tensor]:
    """The noise that one step puts on gradients of two spreads."""
    noise = GradientNoise(name, config, FACTS, *index)
    draw = torch.Generator().manual_seed(0)
    before = [std * torch.randn(400, 500, generator=draw) for std in (1.0, 0.01)]
    after = [gradient.clone() for gradient in before]
    noise.change(after, norm=torch.tensor(1.0), step=step)
    return [new - old for new, old in zip(after, before, strict=True)]


def config(std: float, scale: str) -> NoiseConfig:
    return NoiseConfig(std=std, scale=scale, start_frac=6 / 11)


def test_the_literal_form_has_the_std_it_says_within_2_percent():
    stds = [noise.std().item() for noise in added(config(0.25, "absolute"))]
    assert stds == [pytest.approx(0.25, rel=0.02)] * 2


def test_relative_to_the_rms_of_each_gradient():
    stds = [noise.std().item() for noise in added(config(0.5, "gradient_rms"))]
    assert stds == [pytest.approx(0.5, rel=0.02), pytest.approx(0.005, rel=0.02)]


def test_relative_to_the_bound_on_the_norm():
    noise = added(config(0.1, "clip_norm"))
    norm = math.sqrt(sum(part.square().sum().item() for part in noise))
    assert norm == pytest.approx(0.1 * 0.5, rel=0.02)


def test_nothing_up_to_the_start_and_something_new_in_each_step_after_it():
    assert all(noise.abs().sum() == 0 for noise in added(config(0.1, "absolute"), step=6))
    first, second = (added(config(0.1, "absolute"), step=s)[0] for s in (7, 8))
    assert not torch.equal(first, second)
    assert torch.equal(first, added(config(0.1, "absolute"), step=7)[0])


def test_stability_noise_is_the_baseline_bitwise_up_to_its_start_and_acts_after(tiny):
    plain, noisy = runs(tiny, "noise", "stability.noise.std=0.01")
    # The gradient norm is taken before the noise, so step 13 still shows the baseline's.
    assert first_difference(plain, noisy) == START + 1
    norms = figure(noisy, "stability/noise_norm")
    assert min(norms) == START + 1
    expected = 0.01 * math.sqrt(record(noisy)["params_total"])
    assert norms[START + 1] == pytest.approx(expected, rel=0.03)
    assert figure(plain, "grad/norm")[START + 1] == figure(noisy, "grad/norm")[START + 1]


def test_noise_comes_before_clipping(tiny):
    _, noisy = runs(tiny, "noise", "stability.noise.std=1.0", "recipe.clip_norm=5.0")
    # Its norm is far above the bound, so from the start on the bound always binds.
    fracs = figure(noisy, "grad/clip_frac")
    assert all(fracs[step] == 1.0 for step in range(START + 1, 23))
    assert fracs[START] == 0.0


def test_every_number_can_be_typed_and_a_bound_is_needed_for_its_scale():
    made = compose("train", ["stability=noise", "stability.noise.std=0.5"]).remedies["noise"]
    assert (made.std, made.scale) == (0.5, "absolute")
    for more in (["recipe.clip_norm=null", "stability=noise"], ["stability=[noise,zclip]"]):
        with pytest.raises(InputError, match=r"stability.noise.scale=clip_norm: needs recipe.clip"):
            compose("train", [*more, "stability.noise.scale=clip_norm"])


def test_noise_that_never_starts_says_so():
    notes = compose("train", ["stability=noise", "stability.noise.start_frac=1"]).notes
    assert notes == ["stability=noise changes nothing here: start_frac is 1, the end of the run"]
