import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from tests.nonfinite.test_recorder import FAILING
from tests.runs import metrics, train, weights

OFF = ("watch.gradients_every=null", "watch.activations_every=null", "watch.routers_every=null")
ALWAYS = ("watch.gradients_every=1", "watch.activations_every=1", "watch.routers_every=1")
EYES = ("grad/attention", "update/", "adam/", "act/", "attention/", "output/", "moe/")


@pytest.mark.parametrize("case", [(), FAILING])
def test_with_all_instruments_off_or_at_every_step_the_run_is_bitwise_the_same(case, tiny):
    blind = train(tiny, *case, *OFF, "watch.incidents=false", "study=blind")
    watched = train(tiny, *case, *ALWAYS, "study=watched")
    assert all(torch.equal(weights(watched)[n], w) for n, w in weights(blind).items())
    for dark, bright in zip(metrics(blind), metrics(watched), strict=False):
        if dark["step"] == bright["step"]:
            assert dark.items() <= bright.items()
    assert not any(name.startswith(EYES) for line in metrics(blind) for name in line)
    assert {name.split("/")[0] for line in metrics(watched) for name in line} > {"act", "moe"}


def test_they_are_no_part_of_the_hash_nor_of_the_name(tiny):
    plain, watched = (compose("train", [*tiny, *more]) for more in ((), ALWAYS))
    assert plain.config_hash() == watched.config_hash()
    assert plain.folder == watched.folder


def test_an_interval_below_one_is_refused():
    with pytest.raises(InputError, match=r"watch.routers_every=0: must be at least 1, or null"):
        compose("train", ["watch.routers_every=0"])


@pytest.mark.parametrize("value", ["0", "inf", "nan"])
def test_a_largest_number_that_is_none_is_refused(value):
    with pytest.raises(InputError, match=r"watch.float_max=.*: must be above 0 and finite"):
        compose("train", [f"watch.float_max={value}"])
