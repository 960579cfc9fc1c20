import pytest

from src.config.compose import compose
from src.stability.warmdown import WarmdownConfig
from src.training.schedule import linear
from tests.runs import ROOT
from tests.stability.harnessed import START, figure, first_difference, runs


def test_factors_of_the_write_up():
    warmdown = WarmdownConfig(start_frac=6 / 11, final_factor=0.01)
    factors = {n: warmdown.lr_factor(n - 1, 11000) for n in (1, 6000, 6001, 8500, 11000)}
    assert factors[1] == factors[6000] == 1.0
    assert 0.999 < factors[6001] < 1.0
    assert factors[8500] == pytest.approx(0.505)
    assert factors[11000] == pytest.approx(0.01)


def test_stability_warmdown_changes_the_rate_from_its_start_on_and_nothing_before(tiny):
    plain, warm = runs(tiny, "warmdown")
    assert first_difference(plain, warm) == START + 1
    base, rates = figure(plain, "lr"), figure(warm, "lr")
    logged = figure(warm, "stability/warmdown_factor")
    assert {step: rates[step] / base[step] for step in base} == pytest.approx(logged)
    assert logged[22] == pytest.approx(0.01)


def test_it_multiplies_any_schedule():
    config = compose("train", ["stability=[warmdown,lower_lr]", "recipe.schedule=cosine"])
    plain = compose("train", ["recipe.schedule=cosine"])
    steps = config.recipe.max_steps
    assert config.lr_factor(0) == pytest.approx(0.3 * plain.lr_factor(0))
    assert config.lr_factor(steps - 1) == pytest.approx(0.003 * plain.lr_factor(steps - 1))


def test_on_the_published_code_the_option_replaces_a_schedule_and_so_raises_the_rate():
    option = WarmdownConfig(start_frac=6 / 11, final_factor=0.01).lr_factor(6364, 11_000)
    published = linear(6364, warmup_steps=1100, max_steps=11_000)
    combined = compose("train", ["preset=writeup", "trainer=cpu", "stability=warmdown"])
    assert combined.lr_factor(6364) == pytest.approx(option * published)
    replaced = compose("train", ["preset=writeup_constant", "trainer=cpu", "stability=warmdown"])
    assert replaced.lr_factor(6364) == pytest.approx(option)
    claims = (ROOT / "experiments" / "CLAIMS.md").read_text()
    assert f"to {option / published:.1f} times what it was at step 6,365" in claims
    comment = (ROOT / "conf" / "stability" / "warmdown.yaml").read_text()
    assert round(option / published, 1) == 2.0 and "about twofold at step 6365" in comment
