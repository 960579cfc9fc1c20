"""`audit=true` on a run: what it says before the first step."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.config.compose import compose
from src.run.audit_start import (
    dtype_of,
    looked_at,
    rate_warnings,
    update_warnings,
    weight_dtype,
)
from src.stability.warmdown import WarmdownConfig
from src.train import main
from src.training.schedule import SCHEDULES


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


def updated(recipe, dtype, replace_optimizer=lambda optimizer, _: optimizer):
    return update_warnings(recipe, dtype=dtype, replace_optimizer=replace_optimizer)


@pytest.fixture
def config(tiny):
    return compose("train", tiny)


@pytest.mark.parametrize("fused", [False, True])
def test_an_epsilon_that_is_zero_in_the_dtype_of_the_weights_is_named(config, fused):
    recipe = replace(config.recipe, eps=1e-8, fused=fused)
    lines = updated(recipe, torch.float16)
    if fused:
        # The fused kernel adds it in float32.
        assert lines == []
    else:
        assert "recipe.eps=1e-08 is 0 in float16" in lines[0]
        assert len(lines) == 1
    assert updated(replace(recipe, eps=1e-4), torch.float16) == []
    assert updated(recipe, torch.float32) == []
    assert updated(recipe, torch.bfloat16) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_epsilon_that_is_zero_in_a_wide_dtype_is_named_too(config, dtype):
    (line,) = updated(replace(config.recipe, eps=1e-46), dtype)
    assert "recipe.eps=1e-46 is 0 in " in line
    assert "type recipe.eps=1e-8" in line


def test_an_optimizer_that_a_remedy_puts_in_place_is_tried(config):
    class Bare(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data -= parameter.grad / parameter.grad.norm()

    (line,) = updated(
        config.recipe, torch.float32, replace_optimizer=lambda _, m: Bare(m.parameters(), lr=1.0)
    )
    assert "whose gradient is 0 becomes NaN or Inf in the first update by Bare" in line


def test_weights_are_kept_in_float32_under_autocast():
    assert weight_dtype("16-mixed") == weight_dtype("32-true") == torch.float32
    assert weight_dtype("bf16-true") == torch.bfloat16
    assert weight_dtype("16-true") == torch.float16


def test_a_run_says_that_its_epsilon_is_zero(tiny, capsys):
    fields = ["recipe.precision=bf16-true", "recipe.eps=1e-42", "recipe.fused=false"]
    main([*tiny, *fields, "audit=true"])
    said = " ".join(capsys.readouterr().err.split())
    assert "audit: recipe.eps=1e-42 is 0 in bfloat16" in said
    assert "in the first update by AdamW; type recipe.eps=1e-8" in said


def test_a_rate_that_is_not_finite_is_named_with_what_makes_it_so(config, monkeypatch):
    assert rate_warnings(config) == []
    monkeypatch.setitem(SCHEDULES, config.recipe.schedule, lambda step, **_: [1.0, math.nan][step])
    (line,) = rate_warnings(config)
    assert "the learning rate of step 2 is nan: recipe.schedule=" in line
    monkeypatch.setitem(
        SCHEDULES, config.recipe.schedule, lambda step, *, warmup_steps, max_steps: 0 / (step - 1)
    )
    (line,) = rate_warnings(config)
    assert "the learning rate of step 2 fails: recipe.schedule=" in line
    assert "division by zero" in line


def test_a_rate_of_a_remedy_counts(tiny, monkeypatch):
    config = compose("train", [*tiny, "stability=warmdown"])
    monkeypatch.setattr(WarmdownConfig, "lr_factor", lambda self, step, max_steps: math.inf)
    (line,) = rate_warnings(config)
    assert line == "audit: the learning rate of step 1 is inf: stability=warmdown"


@pytest.mark.parametrize(
    "fields",
    [
        ["recipe.warmup_frac=0.99"],
        ["recipe.warmup_frac=0"],
        ["stability=warmdown", "stability.warmdown.start_frac=1"],
        ["recipe.max_steps=1", "recipe.warmup_frac=0.99"],
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_schedule_of_ours_divides_by_zero(tiny, fields, schedule):
    assert rate_warnings(compose("train", [*tiny, *fields, f"recipe.schedule={schedule}"])) == []


def test_a_long_run_is_looked_at_in_a_moment_and_at_its_edges():
    steps = looked_at(10**9, begin=12_345)
    assert len(steps) < 20_000
    assert {0, 999, 12_344, 12_345, 10**9 - 1} <= set(steps)
    assert looked_at(7, begin=2) == list(range(7))


def test_the_precision_is_that_of_the_run():
    assert str(dtype_of("bf16-mixed")) == "torch.bfloat16"
    assert str(dtype_of("16-true")) == "torch.float16"
    assert str(dtype_of("32-true")) == "torch.float32"
