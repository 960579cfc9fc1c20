import json
import math
import subprocess
import sys

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from src.replay import main as replay
from src.training.guard import StepGuard
from src.watch import IncidentRecorder
from tests.builders import VOCAB
from tests.runs import ROOT, assert_same_tree, metrics, record, train
from tests.training.harness import Harness, guard_config, recipe_config


class Says(list):
    """Collects lines."""

    def __call__(self, line: str) -> None:
        self.append(line)


def recorder(tmp_path) -> IncidentRecorder:
    return IncidentRecorder(tmp_path / "incidents", latest={}, say=Says(), extras={})


def incident_of(folder):
    (file,) = folder.glob("incidents/*/incident.json")
    return json.loads(file.read_text())


# ------------------------------------------------------------------ the failure itself


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_additive_gate_fails_at_its_step_and_the_recorder_names_the_router(seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    arguments = ["preset=crash", "ffn=moe_writeup_add", "tracking=local", f"seed={seed}", *cache]
    folder = train(arguments)
    made = record(folder)
    # T* = 88.72 * E / (rate * (k - E * target)) = 88.72 * 5 / (4 * (2 - 1)).
    expected = 88.72 * 5 / 4
    assert abs(made["guard"]["first_nonfinite_step"] - expected) <= 2
    assert made["incident"]["step"] == made["guard"]["first_nonfinite_step"]
    assert made["incident"]["module"].endswith("ffn.router")
    assert made["incident"]["cause"] == "router underflow"
    assert "score sum of exactly 0 (0/0); mean bias -8" in made["incident"]["line"]
    assert incident_of(folder)["finding"]["operation"].endswith("div")
    assert made["outcome"] == "collapsed"


def test_with_the_correct_router_nothing_happens_in_the_same_run(tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train(["preset=crash", "ffn=moe", "tracking=local", *cache])
    assert record(folder)["incident"] is None
    assert record(folder)["outcome"] == "clean"
    assert not (folder / "incidents").exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_control_fails_within_two_percent_of_its_step(seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train(["preset=control", "tracking=local", f"seed={seed}", *cache])
    step = record(folder)["guard"]["first_nonfinite_step"]
    assert step == pytest.approx(88.72 * 7 / 2.0, rel=0.02)
    assert record(folder)["incident"]["cause"] == "router underflow"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_additive_gate_at_stress_length_fails_within_two_percent_of_its_step(seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    arguments = ["preset=stress", "tracking=local", f"seed={seed}", "recipe.max_steps=440", *cache]
    folder = train([*arguments, "ffn=moe_writeup_add"])
    step = record(folder)["guard"]["first_nonfinite_step"]
    assert step == pytest.approx(88.72 * 5 / 1.785, rel=0.02)
    incident = record(folder)["incident"]
    assert incident["step"] == step
    assert incident["module"].endswith("ffn.router")
    assert "score sum of exactly 0 (0/0)" in incident["line"]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["stress", "control"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_the_correct_router_no_incident_comes_at_that_length(preset, seed, tiny):
    cache = [argument for argument in tiny if argument.startswith("paths.cache")]
    folder = train([f"preset={preset}", "ffn=moe", "tracking=local", f"seed={seed}", *cache])
    assert record(folder)["incident"] is None
    assert record(folder)["outcome"] == "clean"


FAILING = (
    "ffn=moe_writeup_add",
    "recipe.precision=32-true",
    "model.sizes.writeup_bias_rate=400.0",
)


def test_the_recorder_changes_nothing_of_the_run(tiny, monkeypatch):
    watched = train(tiny, *FAILING, "study=watched")
    monkeypatch.setattr(IncidentRecorder, "_observe", lambda *args: None)
    blind = train(tiny, *FAILING, "study=blind")
    assert metrics(watched) == metrics(blind)
    assert record(watched)["guard"] == record(blind)["guard"]
    assert record(watched)["incident"] is not None


def test_one_line_is_shown_and_a_page_without_outside_parts_is_written(tiny, capsys):
    folder = train(tiny, *FAILING)
    made = record(folder)
    assert made["incident"]["line"] in capsys.readouterr().err
    (page,) = folder.glob("incidents/*/incident.html")
    text = page.read_text()
    assert "router underflow" in text
    assert "src=" not in text
    assert "<svg" in text or made["incident"]["step"] == 1
    assert {file.name for file in page.parent.iterdir()} == {
        "incident.html",
        "incident.json",
        "state.pt",
    }


def test_under_accumulation_the_micro_batch_that_failed_is_found(tiny):
    folder = train(tiny, *FAILING, "recipe.accumulate=3")
    assert record(folder)["incident"]["cause"] == "router underflow"


def test_a_recorder_that_fails_says_so_and_the_run_goes_on(tiny, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("src.watch.incident.write_page", full)
    folder = train(tiny, *FAILING)
    assert record(folder)["steps"] == 12
    assert record(folder)["incident"]["cause"] == "unknown"
    assert "could not be recorded (OSError: no space left)" in capsys.readouterr().err


# ------------------------------------------------------------------ replay


@pytest.fixture
def failed(tiny):
    folder = train(tiny, *FAILING)
    (incident,) = folder.glob("incidents/step-*")
    return incident


def test_replay_makes_the_same_tensor_bitwise_in_a_fresh_process(failed):
    done = subprocess.run(
        [sys.executable, "-m", "src.replay", f"incident={failed}", "format=json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    answer = json.loads(done.stdout)
    assert answer["reproduced"]
    assert (
        answer["finding"]["digest"]
        == json.loads((failed / "incident.json").read_text())["finding"]["digest"]
    )


def test_replay_knows_what_an_option_had_changed_in_the_running_router(tiny, capsys):
    # The epsilon is in force, so what fails in the end is not the gate.
    class Overflow(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == 10:
                with torch.no_grad():
                    pl_module.model.final_norm.weight.fill_(3e38)

    inner = pl.Trainer.__init__

    def with_overflow(self, *args, **kwargs):
        inner(self, *args, **(kwargs | {"callbacks": [Overflow(), *kwargs["callbacks"]]}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "__init__", with_overflow)
        folder = train(
            tiny, *FAILING, "stability=router_eps", "stability.router_eps.start_frac=0.0"
        )
    (incident,) = folder.glob("incidents/step-*")
    assert record(folder)["incident"]["step"] == 11
    assert not record(folder)["incident"]["module"].endswith("router")
    capsys.readouterr()
    assert replay([f"incident={incident}", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["reproduced"]


@pytest.mark.parametrize(
    ("change", "averted"),
    [
        ("+with.ffn.router.norm_eps=1e-9", True),
        ("+with.ffn.router.bias_use=select", True),
        ("+with.recipe.z_loss_weight=0.1", False),
    ],
)
def test_replay_says_whether_a_change_would_have_averted_the_step(change, averted, failed, capsys):
    capsys.readouterr()
    assert replay([f"incident={failed}", change, "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["averted"] == averted


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["incident=nowhere"], ["incident=nowhere", "no such checkpoint"]),
        ([], ["incident", "no value yet"]),
        (["+with.ffn.router.foo=1"], ["with.ffn", "foo"]),
        (["+with.ffn.top_k=99"], ["with.ffn.top_k=99", "from 1 to"]),
        (["+with.model.hidden_dim=48"], ["with", "shape"]),
        (["+with.recipe.precision=bf16-mixed"], ["with.recipe.precision", "z_loss_weight"]),
        (["+with.data.path=x"], ["with.data", "model, attention, ffn, recipe"]),
        (["format=xml"], ["format=xml", "text, json"]),
    ],
)
def test_bad_replays_get_one_line(arguments, parts, failed, capsys):
    capsys.readouterr()
    if arguments and not arguments[0].startswith("incident"):
        arguments = [f"incident={failed}", *arguments]
    assert replay(arguments) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert all(part in line for part in parts)


# ------------------------------------------------------------------ planted failures


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
        (nan_in_a_weight, weight, "weights", f"{prefix}.layers.1.{projection}", "guard failure"),
        (
            inf_out_of,
            f"{prefix}.layers.0.{attention}",
            "forward",
            f"{prefix}.layers.0.{attention}",
            "attention overflow",
        ),
        (nan_gradient, weight, "backward", f"{prefix}.layers.1.{projection}", "bad gradient"),
        (exploding, f"{head}.weight", "forward", head, "output divergence"),
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
    assert len(watch.say) == 1
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
    check(watch, "forward", "llama.lm_head", "output divergence")


def test_a_training_step_without_an_index_is_run_again_too(tmp_path, monkeypatch):
    two = Foreign.training_step
    monkeypatch.setattr(Foreign, "training_step", lambda self, batch: two(self, batch, 0))
    watch, _ = fit_foreign(tmp_path, lambda root: exploding(root, "llama.lm_head.weight"))
    check(watch, "forward", "llama.lm_head", "output divergence")


def test_a_training_step_that_returns_nothing_is_a_step_that_was_not_applied(tmp_path, monkeypatch):
    monkeypatch.setattr(Foreign, "training_step", lambda self, batch: None)
    watch, _ = fit_foreign(tmp_path, lambda root: None)
    assert watch.incident["step"] == 1
    assert watch.incident["module"] is None


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
