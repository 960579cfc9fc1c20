import math

import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from src.stability import RouterSmebuConfig, RunFacts
from src.stability.router_smebu import SmebuRule
from tests.builders import gqa_config, moe_config, router_config, transformer
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)
TRINITY = RouterSmebuConfig(rate=None, scale=2.0, momentum=0.5)


def rule(*, rate: float = 0.1, config: RouterSmebuConfig = TRINITY) -> SmebuRule:
    return SmebuRule(config, rate=rate, momentum_E=torch.zeros(4))


def by_hand(
    loads: list[float], momenta: list[float], *, rate: float, beta: float = 0.5
) -> list[float]:
    """The equations of the report, number by number."""
    mean = sum(loads) / len(loads)
    changes = [rate * math.tanh(2.0 * (mean - load) / mean) for load in loads]
    centre = sum(changes) / len(changes)
    return [beta * m + (1 - beta) * (c - centre) for m, c in zip(momenta, changes, strict=True)]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_equations_are_those_of_the_report(beta):
    config = RouterSmebuConfig(rate=None, scale=2.0, momentum=beta)
    made, momenta = rule(config=config), [0.0] * 4
    for loads in ([4, 3, 1, 8], [2, 2, 9, 3], [4, 4, 4, 4]):
        momenta = by_hand(loads, momenta, rate=0.1, beta=beta)
        found = made(torch.tensor(loads))
        torch.testing.assert_close(found, torch.tensor(momenta), rtol=1e-5, atol=1e-8)
        assert abs(float(found.sum())) < 1e-7


def test_a_first_update_is_that_worked_out_elsewhere_to_four_digits():
    first = rule()(torch.tensor([4, 3, 1, 8]))
    expected = torch.tensor([-0.0051, 0.0181, 0.0402, -0.0532])
    torch.testing.assert_close(first, expected, rtol=0, atol=6e-5)


def test_a_small_imbalance_moves_less_than_a_large_one():
    small, large = (rule()(torch.tensor(loads)) for loads in ([5, 4, 4, 3], [8, 4, 4, 0]))
    assert small.abs().max() < 0.5 * large.abs().max() <= 0.5 * 0.1


def test_equal_loads_and_none_at_all_change_nothing():
    for loads in ([3, 3, 3, 3], [0, 0, 0, 0]):
        assert torch.equal(rule()(torch.tensor(loads)), torch.zeros(4))


@pytest.mark.parametrize("ffn", ["moe", "moe_writeup_add"])
def test_it_acts_and_keeps_the_mean_of_the_bias(ffn, tiny):
    plain, treated = runs(tiny, "router_smebu", f"ffn={ffn}", "recipe.precision=32-true")
    assert first_difference(plain, treated) == 1
    steps = figure(treated, "stability/router_smebu_step")
    assert len(steps) == 22 and max(steps.values()) > 0
    assert figure(plain, "stability/router_smebu_step") == {}


class Kept(torch.nn.Module):
    """Counts that a rule has been given, beside the rule."""

    def __init__(self, rule):
        super().__init__()
        self.rule, self.counts = rule, []

    def __call__(self, counts_E):
        self.counts.append(counts_E.tolist())
        return self.rule(counts_E)


def fitted(*others, update_on="step", restored=None, **changes):
    (callback,) = TRINITY.callbacks(FACTS)
    if restored is not None:
        callback.load_state_dict(restored)
    router = router_config(bias_rate=0.1, bias_center=False, update_on=update_on)
    model = transformer(attention=gqa_config(), ffn=moe_config(router=router), max_seq_len=8)
    run = Harness(recipe=recipe_config(**changes), callbacks=[callback, *others], model=model).fit()
    return run, callback


def test_it_updates_once_a_step_under_accumulation_and_not_after_a_skipped_one():
    seen = []

    class Watch(Poison):
        def on_train_start(self, trainer, pl_module):
            for router in pl_module.model.routers():
                router.bias_step = Kept(router.bias_step)
                seen.append(router.bias_step)

    run, callback = fitted(Watch({2}, what="loss"), accumulate=3)
    assert [len(kept.counts) for kept in seen] == [5, 5]
    for number, kept in enumerate(seen):
        momenta, bias = [0.0] * 5, [0.0] * 5
        for loads in kept.counts:
            # All rows of all micro-batches of the step, each sent to 2 experts.
            assert sum(loads) == 3 * 2 * 8 * 2
            momenta = by_hand(loads, momenta, rate=0.1)
            bias = [b + m for b, m in zip(bias, momenta, strict=True)]
        found = run.states[-1]["weights"][f"model.layers.{number}.ffn.router.bias_E"]
        torch.testing.assert_close(found, torch.tensor(bias), rtol=1e-5, atol=1e-6)
        assert abs(float(found.mean())) < 1e-6
    assert run.recorder.lines[1]["stability/router_smebu_step"] > 0
    assert all(rule.momentum_E.isfinite().all() for rule in callback.rules.values())


def test_the_momenta_are_saved_and_restored():
    _, callback = fitted()
    state = callback.state_dict()
    assert set(state["momenta"]) == {f"model.layers.{n}.ffn.router" for n in (0, 1)}
    kept = {path: momentum.clone() for path, momentum in state["momenta"].items()}
    (again,) = TRINITY.callbacks(FACTS)
    again.load_state_dict({"momenta": kept})
    started = []

    class Watch(Poison):
        def on_train_start(self, trainer, pl_module):
            started.extend(r.bias_step.momentum_E.clone() for r in pl_module.model.routers())

    fitted(Watch(set(), what="loss"), restored={"momenta": kept})
    assert all(torch.equal(*pair) for pair in zip(started, kept.values(), strict=True))
    assert max(float(m.abs().max()) for m in started) > 0


def test_a_rate_of_its_own_replaces_that_of_the_router():
    made = compose("train", ["stability=router_smebu", "stability.router_smebu.rate=5e-4"])
    (callback,) = made.remedies["router_smebu"].callbacks(FACTS)
    Harness(callbacks=[callback]).fit()
    assert {rule.rate for rule in callback.rules.values()} == {5e-4}
    _, own = fitted()
    assert {rule.rate for rule in own.rules.values()} == {0.1}


def test_without_it_routers_keep_their_own_rule():
    assert all(router.bias_step is None for router in transformer().routers())


def test_it_needs_a_router_with_a_bias_and_a_sound_momentum():
    for typed, message in (
        (["ffn=mlp"], r"router_smebu: needs ffn.router, which ffn=mlp lacks"),
        (["ffn.router.balance=none"], r"^ffn.router.balance=none: stability=router_smebu needs"),
        (["stability.router_smebu.momentum=1"], r"router_smebu.momentum=1.0: must be at least 0"),
        (["stability.router_smebu.scale=0"], r"stability.router_smebu.scale=0.0: must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            compose("train", ["stability=router_smebu", *typed])
