"""From findings to causes, rule by rule."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nonfinite import causes
from nonfinite import mechanisms as how
from nonfinite.causes import ADVICE, RULES, UNKNOWN, Evidence, cause, describe
from nonfinite.finding import Finding
from nonfinite.update_check import UpdateFault

FORWARD = Finding(
    phase="forward",
    module="model.layers.0.mlp",
    operation="torch.Tensor.mul",
    shape=[2, 3],
    num_elements=6,
    num_nonfinite=1,
    positions=[[0, 0]],
    input_absmax=1.0,
    dtype="float32",
    digest="",
)
SOUND = Evidence(finding=FORWARD, router={}, second_moment_finite=True, weight_absmax=1.0, last={})
SDPA = "torch.nn.functional.scaled_dot_product_attention"
ATTENTION = replace(FORWARD, module="model.layers.0.self_attn", operation=SDPA)


def with_finding(finding: Finding | None, **changes) -> Evidence:
    return replace(SOUND, finding=finding, **changes)


def made_by(mechanism: str, **changes) -> Evidence:
    return with_finding(replace(FORWARD, mechanism=mechanism), **changes)


def faulty_update(name: str) -> Evidence:
    fault = UpdateFault(
        cause=name, operation="Adam step", summary="Adam did", explanation="Because."
    )
    return with_finding(None, update=fault)


UPDATES = ("learning rate not finite", "gradient changed before the update", "optimizer update")
BEFORE = {
    **{name: faulty_update(name) for name in UPDATES},
    "router underflow": with_finding(FORWARD, router={"topk_sum_min": 0.0}),
    "optimizer second moment": with_finding(FORWARD, second_moment_finite=False),
    "non-finite weights": with_finding(replace(FORWARD, phase="weights")),
    "bad batch": with_finding(replace(FORWARD, phase="batch", module="", operation="batch[0]")),
}
PLAIN = (how.ZERO, how.LOG, how.EDGE, how.DOMAIN, how.ZERO_INF, how.INF_INF, how.MASKED)
PLAIN += (how.NO_LABEL, how.CTC, how.EMPTY, how.ONE, how.TINY)
AFTER = {
    "exploding weights": made_by(how.OVERFLOW, weight_absmax=1e7),
    how.HALF: made_by(how.HALF),
    how.EXP: made_by(how.EXP),
    "attention overflow": with_finding(replace(ATTENTION, mechanism=how.OVERFLOW)),
    "output divergence": with_finding(
        replace(FORWARD, module="model.lm_head", mechanism=how.OVERFLOW)
    ),
    "exploding gradient": with_finding(
        replace(FORWARD, phase="backward", operation="norm of the gradient of weight")
    ),
    how.OVERFLOW: made_by(how.OVERFLOW),
    "bad gradient": with_finding(replace(FORWARD, phase="backward", mechanism=how.WRITTEN)),
    how.WRITTEN: made_by(how.WRITTEN),
    # Nor is one that came into the loss.
    how.GIVEN: with_finding(
        replace(FORWARD, operation="input of torch.nn.functional.cross_entropy")
    ),
    "loss outside the model": with_finding(replace(FORWARD, phase="loss")),
    "not reproduced": with_finding(None, why_finite="It was not run again."),
}
CASES = {**BEFORE, **{name: made_by(name, weight_absmax=1e7) for name in PLAIN}, **AFTER}


def test_every_rule_has_a_case_and_advice():
    assert list(CASES) == [name for name, _ in RULES]
    assert set(ADVICE) == {*CASES, "spike"}


def test_a_backward_operation_on_large_gradients_is_an_exploding_gradient():
    grown = replace(FORWARD, phase="backward", input_absmax=1e12)
    assert cause(with_finding(grown)) == "exploding gradient"
    small = replace(grown, input_absmax=0.3)
    assert cause(with_finding(small)) == UNKNOWN
    assert cause(with_finding(small, last={"grad/norm": 1e12})) == "exploding gradient"


def test_a_loss_that_overflows_on_logits_that_diverged_is_output_divergence():
    loss = replace(FORWARD, module="", operation="torch.Tensor.mean", input_absmax=1e30)
    assert cause(with_finding(replace(loss, mechanism=how.OVERFLOW))) == "output divergence"
    assert cause(with_finding(loss)) == UNKNOWN


@pytest.mark.parametrize("name", CASES)
def test_each_cause_is_told_by_its_evidence(name):
    assert cause(CASES[name]) == name


@pytest.mark.parametrize(
    "evidence",
    [
        SOUND,
        # The operands were too small for an overflow of scores.
        with_finding(ATTENTION),
        with_finding(replace(FORWARD, input_absmax=None)),
        # A dtype is no evidence by itself.
        with_finding(replace(FORWARD, dtype="float16")),
        # Scores of infinite logits are 0 without any underflow.
        with_finding(FORWARD, router={"topk_sum_min": 0.0, "picked_logit_min": -math.inf}),
        # A NaN that was put into the loss is no divergence of the output.
        with_finding(replace(FORWARD, operation="loss", module="", dtype="float16")),
    ],
)
def test_what_no_rule_explains_is_unknown(evidence):
    assert cause(evidence) == UNKNOWN


def test_what_was_not_finite_before_any_operation_is_described_as_that():
    batch = replace(FORWARD, phase="batch", module="", operation="batch['x']")
    line = describe(batch, {}, None)
    assert line == "batch['x']: 1 of 6 elements were not finite before the step"
    taken = describe(replace(FORWARD, operation="input of torch.Tensor.mul"), {}, None)
    assert (
        "model.layers.0.mlp: input of torch.Tensor.mul holds 1 NaN or infinite values of 6" in taken
    )
    assert "cannot see" in describe(replace(FORWARD, operation="loss"), {}, None)


ZERO_SUMS = {"topk_sum_min": 0.0, "num_zero_sums": 3.0, "num_tokens": 8.0, "top_k": 2.0}


def test_a_router_is_described_by_what_it_says_of_itself():
    ours = describe(FORWARD, {**ZERO_SUMS, "bias_mean": -41.3}, -0.5)
    assert ours == (
        "model.layers.0.mlp: 3 of 8 tokens have a top-2 score sum of exactly 0 (0/0);"
        " mean bias -41.3, falling 0.5000 a step"
    )
    without_bias = describe(FORWARD, ZERO_SUMS, None)
    assert without_bias.endswith("3 of 8 tokens have a top-2 score sum of exactly 0 (0/0)")
    bare = describe(FORWARD, {"topk_sum_min": 0.0}, None)
    assert bare.endswith("some tokens have a score sum of exactly 0 (0/0)")


def test_the_page_of_the_rules_has_them_in_their_order():
    page = Path(causes.__file__).with_name("INCIDENTS.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert rows[0] == "cause"
    assert rows[1:] == [*(name for name, _ in RULES), UNKNOWN]
