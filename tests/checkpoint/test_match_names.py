"""Weights of other people's files in modules of other people's."""

from pathlib import Path

import pytest
import torch
from torch import nn

from src.checkpoint.match_names import load_weights
from src.common.errors import InputError
from src.examples.llama import build as build_llama

PLACE = Path("some.pt")


def llama():
    return build_llama(vocab_size=20, max_seq_len=16, num_layers=1)


def assert_same(one: nn.Module, two: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_of_tied_weights_a_file_may_hold_one_under_the_names_inside_a_wrapper(kept):
    """So save_pretrained writes them: without the head, and without the wrapper's attribute."""
    source, empty = llama(), llama()
    weights = dict(source.model.state_dict())
    for name in {"model.embed_tokens.weight", "lm_head.weight"} - {kept}:
        del weights[name]
    assert load_weights(empty, weights, place=PLACE) is None
    assert_same(source, empty)
    assert empty.model.lm_head.weight is empty.model.model.embed_tokens.weight


def test_a_name_that_shares_nothing_must_be_there():
    weights = dict(llama().model.state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(InputError, match=r"model\.model\.norm\.weight is missing"):
        load_weights(llama(), {"state_dict": weights}, place=PLACE)


def test_a_lazy_module_takes_the_shape_of_the_file():
    built = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 5))
    assert load_weights(lazy, built.state_dict(), place=PLACE) is None
    x = torch.randn(2, 3)
    assert torch.equal(lazy(x), built(x))


def test_what_is_none_of_the_modules_is_counted():
    linear = nn.Linear(2, 2)
    weights = {f"net.{name}": value for name, value in linear.state_dict().items()}
    note = load_weights(nn.Linear(2, 2), {**weights, "a": torch.ones(1), "b": 3}, place=PLACE)
    assert note == "the model does not use 1 tensors of the checkpoint"
