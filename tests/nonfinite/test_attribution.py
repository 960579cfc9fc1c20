"""Planted failures, in our model and in somebody else's, are found where they were planted."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from nonfinite.lightning import IncidentRecorder
from nonfinite.lightning.guard import StepGuard
from tests.builders import VOCAB
from tests.runs import assert_same_tree
from tests.training.harness import Harness, guard_config, recipe_config


class Says(list):
    """Collects lines."""

    def __call__(self, line: str) -> None:
        self.append(line)


def recorder(tmp_path) -> IncidentRecorder:
    return IncidentRecorder(tmp_path / "incidents", say=Says())


class Foreign(pl.LightningModule):
    """Somebody else's model in somebody else's module."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}
        self.llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads))

    def training_step(self, batch, batch_idx):
        logits = self.llama(input_ids=batch[0], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit_foreign(tmp_path, plant) -> tuple[IncidentRecorder, Foreign]:
    module, watch = Foreign(), recorder(tmp_path)
    plant(module)
    guard = StepGuard(guard_config(), max_steps=2, log_every=1)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[guard, watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    rows = torch.utils.data.TensorDataset(ids[:, :-1], ids[:, 1:])
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader(rows, batch_size=1))
    return watch, module


def nan_in_a_weight(root: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        root.get_parameter(name).view(-1)[0] = math.nan


def inf_out_of(root: torch.nn.Module, name: str) -> None:
    def spoil(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        spoilt = first / torch.zeros(())
        return (spoilt, *output[1:]) if isinstance(output, tuple) else spoilt

    root.get_submodule(name).register_forward_hook(spoil)


def nan_gradient(root: torch.nn.Module, name: str) -> None:
    root.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)


def exploding(root: torch.nn.Module, name: str) -> None:
    with torch.no_grad():
        root.get_parameter(name).fill_(3e38)


def plants(prefix: str, attention: str, head: str, projection: str):
    """(plant, place, phase, module that must be named, cause)."""
    weight = f"{prefix}.layers.1.{projection}.weight"
    return [
        (
            nan_in_a_weight,
            weight,
            "weights",
            f"{prefix}.layers.1.{projection}",
            "non-finite weights",
        ),
        (
            inf_out_of,
            f"{prefix}.layers.0.{attention}",
            "forward",
            f"{prefix}.layers.0.{attention}",
            "division by zero",
        ),
        (nan_gradient, weight, "backward", f"{prefix}.layers.1.{projection}", "bad gradient"),
        (exploding, f"{head}.weight", "forward", head, "exploding weights"),
    ]


def check(watch, phase, module, cause):
    assert watch.incident is not None
    assert watch.incident["finding"]["phase"] == phase
    assert watch.incident["module"] == module
    assert watch.incident["cause"] == cause


@pytest.mark.parametrize(
    ("plant", "place", "phase", "module", "cause"),
    plants("llama.model", "self_attn", "llama.lm_head", "mlp.down_proj"),
)
def test_planted_failures_in_a_foreign_model_are_found(
    plant, place, phase, module, cause, tmp_path
):
    watch, _ = fit_foreign(tmp_path, lambda root: plant(root, place))
    check(watch, phase, module, cause)
    assert [line.split(":")[0].strip() for line in watch.say][-1] == "next"
    assert f"  cause: {cause}. " in "\n".join(watch.say)
    assert (tmp_path / "incidents" / "step-1" / "incident.html").is_file()


def test_a_healthy_foreign_model_has_no_incident(tmp_path):
    watch, _ = fit_foreign(tmp_path, lambda root: None)
    assert watch.incident is None
    assert not (tmp_path / "incidents").exists()


@pytest.mark.parametrize(
    ("plant", "place", "phase", "module", "cause"),
    [
        (*p[:3], p[3], p[4])
        for p in plants("model", "attention", "model.head", "attention.o_proj")
        # Tied to the embedding, an exploding head is not the first to fail.
        if p[0] is not exploding
    ],
)
def test_planted_failures_in_our_model_are_found_and_skipped_bitwise(
    plant, place, phase, module, cause, tmp_path
):
    watch = recorder(tmp_path)
    run = Harness(recipe=recipe_config(max_steps=2), callbacks=[watch])
    plant(run.task, place)
    run.fit()
    check(watch, phase, module, cause)
    assert run.step_guard.summary()["skipped_steps"] == 2
    for name, value in run.states[0]["weights"].items():
        same = torch.equal(value.nan_to_num(), run.states[1]["weights"][name].nan_to_num())
        assert same, name
    assert_same_tree(run.states[0]["optimizer"], run.states[1]["optimizer"])


def test_an_infinite_mask_in_a_buffer_is_not_taken_for_the_cause(tmp_path):
    def plant(root) -> None:
        root.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        exploding(root, "llama.lm_head.weight")

    watch, _ = fit_foreign(tmp_path, plant)
    check(watch, "forward", "llama.lm_head", "exploding weights")


def test_a_training_step_without_an_index_is_run_again_too(tmp_path, monkeypatch):
    two = Foreign.training_step
    monkeypatch.setattr(Foreign, "training_step", lambda self, batch: two(self, batch, 0))
    watch, _ = fit_foreign(tmp_path, lambda root: exploding(root, "llama.lm_head.weight"))
    check(watch, "forward", "llama.lm_head", "exploding weights")


def test_a_training_step_that_returns_nothing_is_a_step_that_was_not_applied(tmp_path, monkeypatch):
    monkeypatch.setattr(Foreign, "training_step", lambda self, batch: None)
    watch, task = fit_foreign(tmp_path, lambda root: None)
    guard = StepGuard.of(task.trainer)
    assert not guard.applied and guard.finite
    # Nothing went wrong, either: whoever leaves a batch out does not use up the one incident.
    assert watch.incident is None
    assert guard.summary()["nonfinite_steps"] == []


def test_the_recorder_says_that_it_needs_the_guard(tmp_path):
    trainer = pl.Trainer(callbacks=[], logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="needs a StepGuard"):
        recorder(tmp_path).on_fit_start(trainer, Foreign())


def test_a_large_spike_is_recorded_once(tmp_path):
    watch = recorder(tmp_path)
    run = Harness(recipe=recipe_config(max_steps=90, learning_rate=1e-4), callbacks=[watch])

    def jolt() -> None:
        if run.trainer.global_step + 1 in (80, 85):
            for parameter in run.task.parameters():
                parameter.grad *= 1e5

    run.task.on_after_backward = jolt
    run.fit()
    assert watch.spike_step == 80
    assert watch.incident is None
    (file,) = tmp_path.glob("incidents/*/incident.json")
    assert json.loads(file.read_text())["kind"] == "spike"
    assert "is a large spike" in watch.say[0]
