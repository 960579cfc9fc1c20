"""trainer=ddp: several processes share the rows of each step, and it is the same run."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.config.compose import compose
from src.data import TrainBatches
from src.train import main
from tests.conftest import PACE
from tests.forked import fork_rank
from tests.runs import last_checkpoint, metrics, record, start, stop_after, train, weights

DDP = "trainer=ddp"
# A large epsilon, because AdamW divides a gradient that is all rounding by its own size.
SOFT = ["recipe.precision=32-true", "recipe.eps=1e-3", "recipe.batch_size=4", "ffn=moe"]

RARE = """
import torch
from torch import nn


class Rare(nn.Module):
    '''Takes the logarithm of 0 where a token comes that is rare.'''

    def __init__(self, vocab_size, token):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        self.gate = Gate(token)

    def forward(self, tokens):
        return self.table(tokens) + self.gate(tokens).unsqueeze(-1)


class Gate(nn.Module):
    def __init__(self, token):
        super().__init__()
        self.token = token
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, tokens):
        return self.scale * ((tokens != self.token) * 0.5).log().clamp(max=0)
"""


@pytest.fixture
def forked(monkeypatch):
    """The other ranks are forked from this process; one test has them start as they do."""
    names = {**vars(subprocess), "Popen": fork_rank}
    monkeypatch.setattr("src.run.ddp.subprocess", SimpleNamespace(**names))


def assert_close(one, two):
    lines = list(zip(metrics(one), metrics(two), strict=True))
    for left, right in lines:
        assert left.keys() == right.keys()
        for name, value in left.items():
            # What each process has of its own tokens alone is logged as the first has it.
            if not name.startswith(("act/", "attention/", "output/")):
                assert value == pytest.approx(right[name], rel=1e-5, abs=1e-5), name
    biases = [name for name in weights(one) if "bias_E" in name]
    assert biases
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-5, atol=1e-5)
    # Counts are summed as integers, so the balance is exactly the same.
    assert all(torch.equal(weights(one)[name], weights(two)[name]) for name in biases)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param(((4, 2), (8, 1)), id="2 1 2"),
        pytest.param(((3, 2), (6, 2), (9, 1)), id="2 2 1 2", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_also_where_the_run_is_killed_and_goes_on_with_another_number(
    parts, tiny, monkeypatch, capfd
):
    options = [*tiny, *SOFT, "stability=[ema,noise,clip03]", "recipe.accumulate=2"]
    one = train(options)
    arguments = [*options, DDP, "study=parts"]
    for step, devices in parts:
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert main([*arguments, f"trainer.devices={devices}"]) == 143
        (two,) = Path("runs", "parts").glob("*/seed-0")
        assert record(two)["steps"] == step
        assert len(last_checkpoint(two).get("rng_of_other_ranks", [])) == devices - 1
        # PyTorch says it once a process: a process of its own has not said it before.
        assert "find_unused_parameters" not in (two / "rank-1.log").read_text()
    assert main([*arguments, "trainer.devices=2"]) == 0
    assert_close(one, two)
    assert record(two)["tokens"] == record(one)["tokens"]
    # What PyTorch itself writes goes past Python: every weight here has a gradient.
    assert "find_unused_parameters" not in capfd.readouterr().err


def test_what_breaks_on_the_second_process_alone_is_found_there(
    tmp_path, monkeypatch, capfd, forked
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rare.py").write_text(RARE)
    options = [*PACE, "model=external", "model.target=rare:Rare", "recipe.batch_size=2", DDP]
    # A token that is in the second row of a step and in no first row until then.
    token, step = _rare_token(options)
    folder = train([*options, f"model.kwargs={{token: {token}}}"])
    assert record(folder)["guard"]["first_nonfinite_step"] == step
    incident = record(folder)["incident"]
    assert (incident["step"], incident["module"]) == (step, "model.gate")
    said = capfd.readouterr().err
    assert said.count(incident["line"]) == 1
    saved = torch.load(folder / "incidents" / f"step-{step}" / "state.pt", weights_only=True)
    assert saved["batches"][0]["batch"][0].shape[0] == 1
    assert (saved["batches"][0]["batch"][0] == token).any()
    assert json.loads((folder / "incidents" / f"step-{step}" / "incident.json").read_text())


def _rare_token(options):
    config = compose("train", [*options, "model.kwargs={token: 0}"])
    corpus = config.data.load(config.tokenizer, cache=Path("cache"), seq_len=config.recipe.seq_len)
    batches = TrainBatches(
        corpus.train, seed=config.seed, batch_size=2, seq_len=config.recipe.seq_len
    )
    rows = [batches.batch(index)[0] for index in range(config.recipe.max_steps)]
    for step, (first, second) in enumerate(rows, start=1):
        before = torch.cat([row.flatten() for row in rows[: step - 1]] + [first])
        new = sorted(set(second.tolist()) - set(before.tolist()))
        if step > 1 and new:
            return new[0], step
    raise AssertionError("no such token in so few steps")


@pytest.mark.slow
def test_processes_end_with_the_first_whatever_ends_it(tiny, tmp_path):
    arguments = [*tiny, "recipe.max_steps=100000", DDP]
    process = start("train", arguments, tmp_path)
    while not list(tmp_path.glob("runs/*/*/*/checkpoints/last.ckpt")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    (other,) = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(6000):
        if not os.path.exists(f"/proc/{other}"):
            break
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{other}")


def _children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def test_a_process_that_cannot_begin_is_named_with_its_log(tiny, capsys, monkeypatch):
    monkeypatch.setattr("src.run.ddp.COMMAND", ["-c", "raise SystemExit('no memory')"])
    assert main([*tiny, DDP]) == 1
    error = capsys.readouterr().err
    assert "rank 1 ended with exit code 1; its log:" in error
    (log,) = Path("runs").rglob("rank-1.log")
    assert "no memory" in log.read_text()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            ["trainer.devices=2"],
            "trainer.devices=2: must be 1; type trainer=ddp to train a run on several",
        ),
        ([DDP, "recipe.batch_size=3"], "trainer.devices=2: must divide recipe.batch_size=3"),
        ([DDP, "trainer.devices=0"], "trainer.devices=0: must be from 1 to"),
        (["trainer=fsdp"], "trainer=fsdp: sharded weights are not supported, because each"),
        (["trainer.strategy=zero"], "trainer.strategy=zero: must be one of single, ddp"),
    ],
)
def test_what_cannot_be_is_refused(tiny, more, line, capsys):
    assert main([*tiny, *more]) == 2
    assert line in capsys.readouterr().err
    assert not list(Path().glob("runs/*"))


@pytest.mark.parametrize(
    "lacking",
    [
        ["ffn=moe_writeup", "stability=router_freeze", "stability.router_freeze.start_frac=0.3"],
        # A bias that picks experts and does nothing else.
        pytest.param(["ffn.router.bias_trainable=true"], marks=pytest.mark.slow),
    ],
    ids=["frozen router", "bias"],
)
def test_a_weight_that_gets_no_gradient_holds_nobody_up(tiny, lacking, forked):
    options = [*tiny, *SOFT, *lacking]
    one = train(options)
    two = train([*options, DDP])
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["stability=[adagc,stable_adamw]", "stability.adagc.warmup_steps=4"],
        ["stability=spam", "stability.spam.theta=20", "stability.spam.clip_after=2"],
        [
            *("stability=rewind", "stability.rewind.back_steps=2", "stability.rewind.every=1"),
            *("ffn=moe_writeup_add", "model.sizes.writeup_bias_rate=400.0"),
        ],
        ["stability=muon"],
    ],
    ids=["norms", "entries", "rewind", "muon"],
)
def test_remedies_of_the_optimizer_act_alike_in_two_processes(options, tiny):
    soft = [argument for argument in SOFT if not argument.startswith("ffn=")]
    arguments = [*tiny, *soft, *options]
    one, two = train(arguments), train(arguments, DDP, "trainer.devices=2", "study=two")
    left, right = (
        {n: v for n, v in metrics(f)[-1].items() if n.startswith(("stability/", "val"))}
        for f in (one, two)
    )
    assert left.keys() == right.keys()
    assert left.get("stability/rewind_rewinds", 1) > 0
    # Muon makes a step of equal size of every gradient, also of one that is all rounding.
    tolerance = 2e-2 if options == ["stability=muon"] else 1e-3
    for name, value in left.items():
        assert right[name] == pytest.approx(value, rel=tolerance, abs=1e-5), name


def test_remedies_of_the_model_see_the_rows_of_all_processes(tiny, forked):
    chosen = "stability=[gated_attention,qk_clip,router_smebu,softcap_attention,swiglu_clamp]"
    options = [*tiny, *SOFT, chosen, "stability.qk_clip.threshold=0.01"]
    one = train(options, "study=one")
    two = train([*options, DDP], "study=two")
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-5, atol=1e-5)
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for name in ("qk_clip_peak", "qk_clip_heads", "qk_clip_total", "router_smebu_step"):
            field = f"stability/{name}"
            assert left[field] == pytest.approx(right[field], rel=1e-4), name
    assert metrics(one)[-1]["stability/qk_clip_total"] > 0
