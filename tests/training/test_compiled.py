"""compile=true: the training step goes through torch.compile, and nothing else does."""

import dataclasses
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nonfinite.lightning import ActivationWatch
from src.common.errors import InputError
from src.config.compile_choice import check_compiler
from src.config.compose import compose
from src.model import Transformer
from src.model.ffn.mlp import MLPConfig
from src.train import main
from src.training.loss import compiled_losses, losses
from tests.builders import VOCAB, model_config, moe_config, router_config, transformer
from tests.runs import assert_same_run, metrics, record, stop_after, train
from tests.training.harness import Harness, recipe_config


@pytest.fixture
def compiled(monkeypatch):
    """What was given to the compiler and how often it was called, in place of compiling it."""
    calls = []

    def compile_(function, **settings):
        def run(*args, **kwargs):
            calls.append(torch.is_grad_enabled())
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    return calls


def test_every_training_step_is_compiled_and_no_validation(tiny, compiled):
    folder = train(tiny, "compile=true", "watch.activations_every=5")
    # The only block, and the loss. The looks apart run them without gradients; the mock does not
    # know that they are not compiled.
    assert compiled.count(True) == 12 * 2
    assert record(folder)["compiled"] and record(folder)["first_step_seconds"] > 0


@pytest.fixture
def graphs(monkeypatch):
    """Counts what is compiled; the code then runs operation by operation."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    return counter


@pytest.mark.parametrize(
    "ffn", [MLPConfig(inner_dim=32), moe_config(router=router_config(balance="aux"))]
)
def test_all_blocks_share_the_code_of_one(ffn, graphs):
    one, other = (transformer(ffn=ffn, model=model_config(num_layers=4)) for _ in range(2))
    run = compiled_losses(one)
    for _ in range(3):
        tokens, targets = torch.randint(VOCAB, (2, 2, 6))
        found = [
            function(model, tokens, targets, z_loss_weight=1e-3) | model.extra_losses()
            for function, model in ((run, one), (losses, other))
        ]
        for loss in found:
            sum(loss.values()).backward()
        for model in (one, other):
            model.finish_batch()
            model.finish_step(applied=True)
    assert graphs.frame_count == 2
    # Its graphs run operation by operation here, but the norms have another backward pass.
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    for mine, its in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_a_layer_with_a_hook_has_code_of_its_own(graphs):
    model = transformer()
    tokens, targets = torch.randint(VOCAB, (2, 2, 6))
    run = compiled_losses(model)
    model.layers[1].register_forward_hook(lambda module, args, output: output * 3)
    found = run(model, tokens, targets, z_loss_weight=0.0)["loss"]
    assert torch.equal(found, losses(model, tokens, targets, z_loss_weight=0.0)["loss"])


def test_a_model_with_a_forward_of_its_own_keeps_it(graphs):
    class Doubled(Transformer):
        def forward(self, tokens_BT):
            return 2 * super().forward(tokens_BT)

    model = transformer()
    model.__class__ = Doubled
    tokens, targets = torch.randint(VOCAB, (2, 2, 6))
    found = compiled_losses(model)(model, tokens, targets, z_loss_weight=0.0)["loss"]
    expected = losses(model, tokens, targets, z_loss_weight=0.0)["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_off_nothing_is_compiled(tiny, compiled):
    assert not record(train(tiny))["compiled"]
    assert compiled == []


def test_it_is_part_of_the_hash_and_of_the_name_where_it_is_on():
    off, on = compose("train", []), compose("train", ["compile=true"])
    assert off.config_hash() != on.config_hash()
    assert off.config_hash() == dataclasses.replace(on, compile=False).config_hash()
    assert on.variant_name.endswith("@compile-true")


def test_auto_compiles_runs_that_are_long_enough():
    assert not compose("train", ["compile=auto"]).compile
    assert compose("train", ["compile=auto", "recipe.max_steps=20000"]).compile
    assert compose("train", ["compile=auto", "model=small"]).compile


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"needs the C\+\+ compiler g\+\+, which"):
        check_compiler(compiled=True, device="cpu")
    check_compiler(compiled=False, device="cpu")
    check_compiler(compiled=True, device="cuda")


def test_a_look_apart_sees_the_same_and_changes_nothing():
    seen, runs = [], {}
    for apart in (False, True):
        watch = ActivationWatch(every=2, apart=apart)
        runs[apart] = Harness(recipe=recipe_config(), callbacks=[watch]).fit()
        seen.append(
            {
                (step, name): value
                for step, line in runs[apart].recorder.lines.items()
                for name, value in line.items()
                if name.startswith(("act/", "attention/", "output/"))
            }
        )
    assert seen[0] and seen[0] == pytest.approx(seen[1])
    for one, other in zip(runs[False].task.parameters(), runs[True].task.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["attention=gqa ffn=mlp", "attention=mlha ffn=moe"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_run_is_the_plain_one_but_for_rounding_and_resumes_bitwise(
    tiny, cell, precision, monkeypatch
):
    given = [a for a in tiny if not (a.startswith("ffn.") and "mlp" in cell)]
    given += [*cell.split(), f"recipe.precision={precision}"]
    plain, whole = train(given), train(given, "compile=true")
    losses = [
        [line["train/loss"] for line in metrics(folder) if "train/loss" in line]
        for folder in (plain, whole)
    ]
    # Twelve steps of float32, or of bfloat16 with its 8 bits.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if precision == "32-true" else 2e-2)
    stopped = [*given, "compile=true", "study=stopped"]
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main(stopped) == 143
    assert main(stopped) == 0
    assert_same_run(whole, whole.parents[2] / "stopped" / whole.parents[0].name / "seed-0")
