"""`audit=true` on a run: what it says before the first step."""

import json
import math
from pathlib import Path

import pytest

from src.run.audit_start import dtype_of, optimizer_warnings
from src.train import main

RATES = [1e-3, 1e-3]


def test_the_router_of_the_write_up_is_named_before_the_first_step(tiny, capsys):
    assert main([*tiny, "ffn=moe_writeup", "audit=true", "tracking=local"]) == 0
    said = capsys.readouterr().err
    assert "audit: division by zero within reach at" in said
    assert "router.py" in said
    assert "bias_E moved (largest entry 0 -> " in said


@pytest.mark.slow
def test_an_audit_changes_no_number_of_the_run(tiny, capsys):
    assert main([*tiny, "tracking=local", "study=plain"]) == 0
    assert main([*tiny, "tracking=local", "study=audited", "audit=true"]) == 0
    assert "audit: nothing non-finite is within reach" in capsys.readouterr().out
    losses = []
    for study in ("plain", "audited"):
        lines = next(Path("runs", study).rglob("metrics.jsonl")).read_text().splitlines()
        found = [json.loads(line) for line in lines]
        losses.append([{k: v for k, v in line.items() if "loss" in k} for line in found])
    assert losses[0] == losses[1]


def test_an_epsilon_that_is_zero_in_the_dtype_of_the_weights_is_named():
    (line,) = optimizer_warnings(eps=1e-8, precision="16-true", rates=RATES)
    assert "recipe.eps=1e-08 is 0 in float16" in line
    assert optimizer_warnings(eps=1e-4, precision="16-true", rates=RATES) == []
    assert optimizer_warnings(eps=1e-8, precision="16-mixed", rates=RATES) == []


def test_a_rate_that_is_not_finite_is_named():
    (line,) = optimizer_warnings(eps=1e-8, precision="32-true", rates=[1e-3, math.nan])
    assert "the learning rate of step 2 is nan" in line


def test_the_precision_is_that_of_the_run():
    assert str(dtype_of("bf16-mixed")) == "torch.bfloat16"
    assert str(dtype_of("16-true")) == "torch.float16"
    assert str(dtype_of("32-true")) == "torch.float32"
