"""The memory that `describe` predicts is what a step takes."""

import gc
import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from src import describe
from src.common.random_streams import generator
from src.config.compose import compose
from src.config.memory_estimate import predict_memory
from src.training.loss import losses
from src.training.task import build_optimizer
from tests.runs import ROOT, in_a_child

BASE = ["recipe.batch_size=8", "recipe.seq_len=128", "tokenizer=byte"]
CHECKPOINTED = "trainer.activation_checkpointing=true"


def measured(config, *, vocab_size, folder) -> int:
    """Bytes of tensors at the peak of a second step, above those that are there before it."""
    model = config.architecture.build(
        vocab_size=vocab_size, generator_for=lambda name: generator(0, "init", name)
    )
    if config.recipe.precision == "bf16-true":
        model.to(torch.bfloat16)
    model.checkpoint_blocks = config.trainer.activation_checkpointing
    optimizer = build_optimizer(model.parameters(), config.recipe)
    shape = config.recipe.batch_size, config.recipe.seq_len
    tokens_BT = torch.randint(vocab_size, shape)
    bf16 = config.recipe.precision == "bf16-mixed"

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = losses(model, tokens_BT, tokens_BT, z_loss_weight=0.0)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    # Tensors of other tests that are collected during the step would count as memory of the step.
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = [event["args"] for event in events if event.get("name") == "[memory]"]
    # The allocator's own totals, because on a busy machine the clock may put events in a wrong
    # order. What an earlier profile has counted and is still there is in all of them.
    there = min(change["Total Allocated"] - max(0, change["Bytes"]) for change in changes)
    peak: int = max(change["Total Allocated"] for change in changes) - there
    return peak


@pytest.mark.parametrize(
    "arguments",
    [
        ["ffn=moe", "recipe.precision=32-true"],
        ["ffn=moe", "recipe.precision=bf16-mixed"],
        ["ffn=moe", "recipe.precision=bf16-mixed", CHECKPOINTED],
        ["ffn=moe", "recipe.precision=bf16-true"],
        ["attention=gqa", "ffn=mlp"],
        ["ffn=moe_writeup"],
        ["ffn=mlp", "model.vocab_size=20000"],
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_a_step_takes_what_is_predicted(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose("train", [*BASE, *arguments])
    vocab_size = config.architecture.vocab_size or 257
    memory = predict_memory(config, vocab_size=vocab_size)
    fixed = memory.weights + memory.moments
    predicted = max(memory.activations + memory.working, memory.gradients)
    # In a child, which takes the profiler's memory with it.
    found = in_a_child(measured, config, vocab_size=vocab_size, folder=tmp_path)
    assert fixed + predicted == pytest.approx(fixed + found, rel=0.15)
    assert predicted == pytest.approx(found, rel=0.25)


def test_the_peak_is_weights_moments_and_the_greater_of_the_rest():
    memory = predict_memory(compose("train", [*BASE, "stability=ema"]), vocab_size=257)
    assert memory.averages == memory.weights == memory.gradients == memory.moments // 2
    parts = memory.weights + memory.moments + memory.averages + memory.program + memory.kernels
    assert memory.peak == parts + memory.activations + memory.working


def test_snapshots_are_counted_where_they_are_held():
    """Three of them by default, each of weights and two moments."""
    config = compose("train", [*BASE, "stability=[ema,rewind]"])
    memory = predict_memory(config, vocab_size=257)
    assert memory.averages == (1 + 3 * 3) * memory.weights
    assert config.remedies["rewind"].num_weight_copies("cuda") == 0


def test_gradients_of_micro_batches_lie_beside_the_next_activations():
    once = predict_memory(compose("train", BASE), vocab_size=257)
    more = predict_memory(compose("train", [*BASE, "recipe.accumulate=4"]), vocab_size=257)
    assert more.peak == once.peak + once.gradients


def test_describe_shows_it_and_says_nothing_of_what_it_does_not_know(capsys):
    assert describe.main([*BASE, "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["peak"] > 3 * found["memory"]["weights"]
    assert describe.main(BASE) == 0
    assert "memory of a run in bf16-mixed, bytes" in capsys.readouterr().out
    external = ["model=external", "model.target=src.examples.mlp:MLPLanguageModel", *BASE]
    assert describe.main([*external, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["memory"] is None


def test_two_devices_have_half_of_the_activations_each():
    whole = predict_memory(compose("train", BASE), vocab_size=257)
    half = predict_memory(compose("train", [*BASE, "trainer=ddp"]), vocab_size=257)
    assert half.weights == whole.weights
    assert 0.4 < half.activations / whole.activations < 0.7


PEAK = """
import re, sys
from src.train import main

assert main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()
print("peak", int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024)
"""


WITH_BF16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU has no products in bfloat16: it takes ten minutes, and less memory",
)


def test_experts_in_bf16_have_kernels_on_a_cpu():
    def kernels(*fields):
        return predict_memory(compose("train", [*BASE, *fields]), vocab_size=257).kernels

    assert kernels("ffn=moe", "recipe.precision=bf16-mixed") > 0
    assert kernels("ffn=moe", "recipe.precision=32-true") == 0
    assert kernels("ffn=mlp", "recipe.precision=bf16-mixed") == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["ffn=moe", "recipe.precision=32-true"],
        pytest.param(["ffn=moe", "recipe.precision=bf16-mixed"], marks=WITH_BF16),
        ["attention=gqa", "ffn=mlp", "recipe.precision=32-true"],
        pytest.param(["attention=gqa", "ffn=mlp", "recipe.precision=bf16-mixed"], marks=WITH_BF16),
    ],
    ids=lambda each: "+".join(each),
)
def test_a_process_takes_little_more_than_is_predicted(arguments, tmp_path, shared_cache):
    """Of a run as it is typed, all libraries and its validation included."""
    steps = ["recipe.max_steps=12", "recipe.num_validations=1", "recipe.val_windows=8"]
    given = [*arguments, *steps, "model=small", "recipe.batch_size=8", "recipe.seq_len=256"]
    given += ["tokenizer=byte", "trainer=cpu"]
    config = compose("train", given)
    predicted = predict_memory(config, vocab_size=257).peak
    where = ["tracking=local", f"paths.cache={shared_cache}", f"paths.runs={tmp_path}/runs"]
    command = [sys.executable, "-c", PEAK, *given, *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = int(done.stdout.splitlines()[-1].removeprefix("peak "))
    # From 1.0 to 1.2 of it from run to run: what the C library keeps is not predicted.
    assert 0.95 < found / predicted < 1.25
