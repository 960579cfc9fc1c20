"""Runs on a GPU: the same training as on the CPU, the same words where it fails, its memory.

Sums are taken in another order there, so equality is to a tolerance.
"""

import json
from pathlib import Path

import pytest
import torch

from src import generate, replay
from src.config.memory_estimate import predict_memory
from src.lab.benchmark.race import race
from src.lab.benchmark.shapes import Case
from src.train import main
from tests.runs import metrics, record, stop_after, train, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = "trainer=gpu"
FLOAT32 = "recipe.precision=32-true"
# A large epsilon, because AdamW divides a gradient that is all rounding by its own size.
SOFT = [FLOAT32, "recipe.eps=1e-3"]
CELLS = [(attention, ffn) for attention in ("gqa", "mlha") for ffn in ("mlp", "moe")]


def assert_close(one: Path, two: Path, *, rel: float) -> None:
    for left, right in zip(metrics(one), metrics(two), strict=True):
        assert left.keys() == right.keys()
        for name in ("train/loss", "val/loss"):
            if name in left:
                assert left[name] == pytest.approx(right[name], rel=rel), name
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name].cpu(), weight.cpu(), rtol=rel, atol=rel)


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_float32_trains_as_on_the_cpu(attention, ffn, tiny):
    given = [*tiny, *SOFT, f"attention={attention}", f"ffn={ffn}", "stability=[ema,clip03]"]
    # The device is no part of a run's name.
    cpu, gpu = train(given, "trainer=cpu", "study=cpu"), train(given, GPU, "study=gpu")
    assert_close(cpu, gpu, rel=1e-4)


def test_bf16_trains_nearly_as_float32(tiny):
    given = [*tiny, "ffn=moe", GPU]
    exact, mixed = train(given, FLOAT32), train(given, "recipe.precision=bf16-mixed")
    losses = [metrics(run)[-1]["val/loss"] for run in (exact, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_compiled_step_trains_as_an_eager_one(precision, tiny):
    given = [*tiny, *SOFT, "ffn=moe", GPU, f"recipe.precision={precision}"]
    eager, compiled = (train(given, f"compile={on}", f"study={on}") for on in ("false", "true"))
    assert record(compiled)["first_step_seconds"] > 3 * record(eager)["first_step_seconds"]
    assert_close(eager, compiled, rel=1e-4 if precision == "32-true" else 1e-2)


def test_checkpointed_blocks_train_alike(tiny):
    given = [*tiny, *SOFT, "ffn=moe", GPU]
    again = train(given, "trainer.activation_checkpointing=true", "study=again")
    assert_close(train(given), again, rel=1e-5)


@pytest.mark.parametrize("options", ["ema,noise,clip03", "adagc,ema,muon,rewind,spam,stable_adamw"])
def test_interrupted_and_resumed_equals_uninterrupted(options, tiny, monkeypatch):
    given = [*tiny, *SOFT, "ffn=moe", f"stability=[{options}]", GPU]
    whole = train(given)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert main([*given, "study=again"]) == 143
    (again,) = Path("runs", "again").glob("*/seed-0")
    assert record(again)["steps"] == 5
    assert main([*given, "study=again"]) == 0
    assert_close(whole, again, rel=1e-5)


def test_a_failure_is_named_as_on_the_cpu_and_found_again(tiny, capsys):
    where = [argument for argument in tiny if argument.startswith("paths.")]
    given = ["preset=crash", FLOAT32, "tracking=local", *where]
    findings = []
    for trainer in ("cpu", "gpu"):
        run = train(given, f"trainer={trainer}", f"study={trainer}")
        first = sorted((run / "incidents").glob("*/incident.json"))[0]
        capsys.readouterr()
        assert replay.main([f"incident={first.parent}"]) == 0
        assert "reproduced: the same tensor, bitwise" in capsys.readouterr().out
        findings.append(json.loads(first.read_text())["finding"])
    one, two = findings
    # Which layer comes first hangs on last bits.
    assert one["module"].endswith(".ffn.router") and two["module"].endswith(".ffn.router")
    for field in ("phase", "operation", "dtype"):
        assert one[field] == two[field]


def test_a_run_tells_its_card_and_its_checkpoint_writes(tiny, capsys):
    run = train([*tiny, GPU])
    assert torch.cuda.get_device_name() in (run / "record.json").read_text()
    capsys.readouterr()
    assert generate.main([f"run={run}", "prompt=And", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("cell", ["gqa+mlp", "mlha+moe"])
def test_the_memory_of_a_step_is_what_is_predicted(cell, precision):
    case = Case(
        shape="smollm2_135m",
        cell=cell,
        precision=precision,
        device="cuda",
        threads=1,
        batch_size=4,
    )
    memory = predict_memory(case.config(), vocab_size=case.sizes.vocab_size)
    (found,), failed = race(case, ["ours"], rounds=1, steps=2, warmup=2)
    assert not failed
    assert memory.step - memory.program == pytest.approx(found.peak_bytes, rel=0.15)
