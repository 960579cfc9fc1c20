"""The benchmark of a step: what it refuses, and what its floor and its contenders are made of."""

import json

import pytest
import torch

from src.lab.benchmark import contestants
from src.lab.benchmark.contender import build
from src.lab.benchmark.floor import products
from src.lab.benchmark.shapes import Case
from src.training import loss
from tests.runs import lab

CASE = Case(
    shape="proxy",
    cell="mlha+moe",
    precision="32-true",
    device="cpu",
    threads=1,
    batch_size=2,
)

BAD = {
    "shapes=[huge]": "shapes=['huge']: must be a list of proxy, mid",
    "cells=gqa": "cells=gqa: must be a list of gqa+mlp, mlha+moe",
    "contestants=[nobody]": "must be a list of ours, ours compiled",
    "precision=fp8": "precision=fp8",
    "rounds=0": "rounds=0: must be at least 1",
    "batch_size=0": "batch_size=0: must be at least 1",
    "format=xml": "format=xml",
    "out=/proc/none/there": "out=/proc/none/there: cannot be written",
    "out=/proc": "out=/proc: cannot be written",
    "round=3": "unknown field",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case, capsys):
    assert lab("bench")([case]) == 2
    error = capsys.readouterr().err
    assert BAD[case] in error and error.count("\n") == 1


def test_the_floor_has_the_products_of_the_model():
    config = CASE.config()
    vocab_size = CASE.sizes.vocab_size
    rows = CASE.tokens
    flops = sum(
        2 * p.count * p.rows * p.inputs * p.outputs
        for p in products(config.architecture, tokens=rows, vocab_size=vocab_size)
    )
    size = config.architecture.measure(vocab_size=vocab_size)
    # Twice each active weight of a matrix, a token; tied embeddings are the head's.
    norms = size.params_by_part["norms"]
    assert flops / rows == pytest.approx(2 * (size.params_active - norms), rel=0.01)


@pytest.mark.slow
def test_a_race_gives_every_contestant_its_turns(capsys):
    given = ["cells=[gqa+mlp]", "contestants=[ours,floor]", "rounds=2", "steps=1", "warmup=2"]
    assert lab("bench")([*given, "batch_size=1", "format=json"]) == 0
    ours, floor = map(json.loads, capsys.readouterr().out.splitlines())
    assert (ours["name"], floor["name"]) == ("ours", "floor")
    assert ours["num_params"] == floor["num_params"]
    assert ours["of_floor"] < floor["of_floor"] == 1.0
    assert len(ours["losses"]) == 2 and all(loss > 0 for loss in ours["losses"])
    # So small a step is next to nothing beside the program.
    assert ours["predicted_bytes"] == pytest.approx(ours["peak_bytes"], rel=0.5)
    assert floor["predicted_bytes"] is None


def test_ours_takes_the_loss_that_a_run_takes(monkeypatch):
    """A run never has all logits of a large vocabulary."""
    calls = []
    chunked = loss.linear_cross_entropy

    def counted(states, weight, targets):
        calls.append(len(targets))
        return chunked(states, weight, targets)

    monkeypatch.setattr(loss, "CHUNKED_VOCAB", CASE.sizes.vocab_size)
    monkeypatch.setattr(loss, "linear_cross_entropy", counted)
    contestants.build(contestants.OURS, CASE, num_params=0).step()
    assert calls == [CASE.tokens]


def test_a_contender_trains_decodes_and_counts_its_cache():
    shape = {
        "arch": "mlha_moe",
        "vocab": 32,
        "hidden": 32,
        "layers": 2,
        "heads": 2,
        "seq": 8,
        "theta": 1e4,
        "tie": True,
        "intermediate": 32,
        "rope_dim": 8,
        "nope_dim": 8,
        "v_dim": 16,
        "q_rank": 8,
        "kv_rank": 8,
        "moe_intermediate": 16,
        "n_routed": 4,
        "n_shared": 1,
        "top_k": 2,
    }
    model, loss_of, extra = build(shape)
    tokens = torch.randint(32, (2, 9))
    loss_of(model, tokens[:, :-1], tokens[:, 1:]).backward()
    extra["after_step"](model)
    assert extra["generate"](model, tokens[:1, :4], 3).shape == (1, 7)
    assert extra["cache_bytes"](model, tokens) == 2 * (8 + 8) * 4
    with pytest.raises(ValueError, match="v_dim=9"):
        build({**shape, "v_dim": 9})
