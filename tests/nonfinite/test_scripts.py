"""`watch` in training scripts as people have them, with and without a planted fault.

Each script runs unchanged, with `watch` added, and with a fault of its own.
"""

import html
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nonfinite import watch
from nonfinite.__main__ import main
from tests.forked import python
from tests.nonfinite.watched import Ran, same, state_of, unwatched

HERE = "tests.nonfinite.test_scripts"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(rows, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.drop(self.mlp(x))


class GPT(nn.Module):
    """Embedding and head share a weight; a token that is left out has norm 0."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(17, 16), nn.Embedding(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, 17, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids, targets, keep):
        x = (self.tokens(ids) + self.places(torch.arange(ids.shape[1]))) * keep[..., None]
        x = x / x.norm(dim=-1, keepdim=True)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def gpt(add: Callable, *, faulty: bool = False) -> Ran:
    """Two parameter groups, four micro-batches a step, bfloat16, clipping."""
    torch.manual_seed(0)
    model = GPT()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    handle = add(model, optimizer)
    ran = Ran([handle], [], [])
    for step in range(1, 7):
        for micro in range(4):
            ids, keep = torch.randint(17, (3, 9)), torch.ones(3, 8)
            if faulty and (step, micro) == (4, 2):
                keep[1, 5] = 0
            with torch.autocast("cpu", dtype=torch.bfloat16):
                _, loss = model(ids[:, :-1], ids[:, 1:], keep)
            (loss / 4).backward()
            ran.measured.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ran.states.append(state_of(model, optimizer))
    return ran


class Generator(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x).squeeze(-1).sigmoid()


def gan(add: Callable, *, faulty: bool = False) -> Ran:
    """Two models with an optimizer each; the loss on probabilities is outside of both."""
    torch.manual_seed(0)
    generator, critic = Generator(), Discriminator()
    makers = torch.optim.Adam(generator.parameters(), lr=1e-2, betas=(0.5, 0.999))
    critics = torch.optim.Adam(critic.parameters(), lr=1e-2, betas=(0.5, 0.999))
    ran = Ran([add(generator, makers), add(critic, critics)], [], [])
    for step in range(1, 7):
        critics.zero_grad()
        fake = generator(torch.randn(8, 4))
        on_real, on_fake = critic(torch.randn(8, 6) + 1), critic(fake.detach())
        if faulty and step == 4:
            on_fake = 1 - on_fake * 0  # a critic that is sure
        loss = -(on_real.log() + (1 - on_fake).log()).mean()
        loss.backward()
        critics.step()
        makers.zero_grad()
        made = -critic(fake).log().mean()
        made.backward()
        makers.step()
        ran.measured.append((loss.item(), made.item()))
        failing = (critic, critics) if faulty else (critic, critics, generator, makers)
        ran.states.append(state_of(*failing))
    return ran


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
        self.actor, self.critic = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, seen):
        hidden = self.body(seen)
        return self.actor(hidden), self.critic(hidden).squeeze(-1)


class Walk:
    """Ten steps left or right; it is best to stay near 0."""

    def reset(self):
        self.place, self.time = torch.rand(()).item(), 0
        return self.seen()

    def seen(self):
        return torch.tensor([self.place, self.place**2, self.time / 10])

    def step(self, action):
        self.place += 0.3 if action else -0.3
        self.time += 1
        return self.seen(), -abs(self.place), self.time == 10


def ppo(add: Callable, *, faulty: bool = False) -> Ran:
    """Rollouts under no_grad with the policy that learns, and a look at it before each step."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    ran = Ran([add(policy, optimizer)], [], [])
    world = Walk()
    seen = world.reset()
    for iteration in range(3):
        steps = []
        with torch.no_grad():
            for _ in range(16):
                logits, value = policy(seen)
                chosen = torch.distributions.Categorical(logits=logits)
                action = chosen.sample()
                after, reward, done = world.step(action.item())
                steps.append((seen, action, chosen.log_prob(action), value, torch.tensor(reward)))
                seen = world.reset() if done else after
        states, actions, before, values, rewards = map(torch.stack, zip(*steps, strict=True))
        ran.measured.append(rewards.sum().item())
        if faulty and iteration == 1:
            states[9, 1] = torch.nan  # a sensor that fails
        returns = rewards.flip(0).cumsum(0).flip(0) * 0.1
        for rows in [rows for _ in range(2) for rows in torch.randperm(16).split(8)]:
            with torch.no_grad():
                policy(states[rows])
            logits, value = policy(states[rows])
            now = torch.distributions.Categorical(logits=logits, validate_args=False)
            ratio = (now.log_prob(actions[rows]) - before[rows]).exp()
            gain = returns[rows] - values[rows]
            gain = (gain - gain.mean()) / (gain.std() + 1e-8)
            loss = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
            loss = loss + F.mse_loss(value, returns[rows]) - 0.01 * now.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()
            ran.states.append(state_of(policy, optimizer))
    return ran


class Classifier(nn.Sequential):
    def __init__(self) -> None:
        convolution = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        super().__init__(*convolution, nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 3))


def classifier(add: Callable, *, faulty: bool = False) -> Ran:
    """A rate that warms up and decays, over 0 steps if faulty; evaluated every two steps."""
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(3, (64,))
    rows = torch.utils.data.TensorDataset(images[:48], labels[:48])
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    decay = torch.tensor(0.0 if faulty else 5.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: (n + 1) / 3 if n < 3 else (1 - (n - 3) / decay).item()
    )
    ran = Ran([add(model, optimizer)], [], [])
    for _ in range(2):
        for number, (x, y) in enumerate(torch.utils.data.DataLoader(rows, 12, shuffle=True)):
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            if number % 2:
                model.eval()
                with torch.no_grad():
                    logits = model(images[48:])
                right = (logits.argmax(-1) == labels[48:]).float().mean()
                ran.measured.append((F.cross_entropy(logits, labels[48:]).item(), right.item()))
            ran.states.append(state_of(model, optimizer))
    return ran


SCRIPTS = [gpt, gan, ppo, classifier]


FAULTS = {
    gpt: (4, "division by zero", "x = x / x.norm(dim=-1, keepdim=True)"),
    gan: (4, "loss outside the model", None),
    ppo: (6, "bad batch", None),
    classifier: (4, "learning rate not finite", None),
}


"""Step, cause and line of each script's fault; a line where the model's code is to blame."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_sound_script_ends_with_the_same_bits(script, capsys):
    plain, watched = script(unwatched), script(watch)
    assert same(watched.states, plain.states)
    assert same(watched.measured, plain.measured)
    assert not any(handle.incidents for handle in watched.handles)
    assert capsys.readouterr().err == "" and not Path("incidents").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fault_is_named_and_its_step_left_out(script, capsys):
    ran = script(watch, faulty=True)
    step, cause, line = FAULTS[script]
    (incident,) = ran.handle.incidents
    assert (incident["step"], incident["cause"]) == (step, cause)
    assert ran.handle.nonfinite_steps[0] == step
    if line is not None:
        assert Path(incident["source"]["file"]).name == "test_scripts.py"
        assert incident["source"]["code"] == line
    printed = capsys.readouterr().err
    assert f"step {step}: " in printed and f"cause: {cause}. " in printed
    # Weights, buffers and the optimizer's state are those after the step before.
    assert same(ran.states[step - 1], ran.states[step - 2])
    assert not same(ran.states[step - 2], ran.states[step - 3])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_says_in_words_what_happened(script):
    ran = script(watch, faulty=True)
    (incident,) = ran.handle.incidents
    page = Path("incidents", f"step-{incident['step']}", "incident.html").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    assert f"Step {incident['step']}: {incident['cause']}" in text
    assert incident["explanation"] in text
    assert f"What usually helps: {incident['advice']}." in text
    if incident["source"] is not None:
        assert incident["source"]["code"] in text


@pytest.mark.parametrize(
    ("script", "model"), [(gpt, "GPT"), (gan, "Discriminator"), (ppo, "Policy")]
)
def test_an_incident_is_run_again_from_its_folder(script, model, capsys):
    step = script(watch, faulty=True).handle.incidents[0]["step"]
    assert main([f"incidents/step-{step}", "--model", f"{HERE}:{model}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reproduced, bitwise"


def test_an_incident_is_run_again_in_another_process():
    gpt(watch, faulty=True)
    done = python("-m", "nonfinite", "incidents/step-4", "--model", f"{HERE}:GPT")
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "torch.Tensor.div" in first and "the divisor is 0 (0/0) for 16 of 384" in first
    assert last == "reproduced, bitwise"


class SignedRoot(nn.Module):
    """An activation whose derivative at 0 is infinite."""

    def forward(self, x):
        return x.sign() * x.abs().sqrt()


def fine_tuned(*callbacks: Any, faulty: bool, reentrant: bool = False) -> tuple[Any, Ran]:
    """A tiny Llama under transformers' Trainer; a row that starts with the padding is the fault."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        attention_dropout=0.1,
    )
    model = transformers.LlamaForCausalLM(config)
    if faulty:
        model.model.layers[1].mlp.act_fn = SignedRoot()
    ids = torch.randint(1, 31, (24, 8))
    ids[13, 0] = 0 if faulty else 1
    states: list[Any] = []

    class Notes(transformers.TrainerCallback):
        def on_step_end(self, *args, model, optimizer, **kwargs):
            states.append(state_of(model, getattr(optimizer, "optimizer", optimizer)))

    arguments = transformers.TrainingArguments(
        output_dir="out",
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row.clone()} for row in ids],
        callbacks=[Notes(), *callbacks],
    )
    trainer.train()
    kept = ("loss", "grad_norm", "learning_rate", "step")
    logged = [{key: line[key] for key in kept if key in line} for line in trainer.state.log_history]
    return trainer, Ran([getattr(c, "handle", None) for c in callbacks], logged, states)


@pytest.fixture
def callback():
    """The callback's class, where the Trainer has all that it needs."""
    pytest.importorskip("accelerate")
    from nonfinite.transformers import Nonfinite

    return Nonfinite


def test_the_trainer_ends_with_the_same_bits(callback):
    _, plain = fine_tuned(faulty=False)
    _, watched = fine_tuned(callback(), faulty=False)
    assert same(watched.states, plain.states) and same(watched.measured, plain.measured)
    assert watched.handles[0].incidents == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_fault_in_a_checkpointed_block_is_named(callback, reentrant):
    _, ran = fine_tuned(callback(), faulty=True, reentrant=reentrant)
    (incident,) = ran.handle.incidents
    step = incident["step"]
    assert ran.handle.nonfinite_steps == [step]
    assert incident["cause"] == "infinite slope at the edge of the domain"
    assert incident["source"]["code"] == "return x.sign() * x.abs().sqrt()"
    assert reentrant or incident["module"] == "model.layers.1.mlp.act_fn"
    assert same(ran.states[step - 1], ran.states[step - 2])


def test_the_trainer_stops_or_raises_as_it_is_told(callback):
    trainer, ran = fine_tuned(callback(on_nonfinite="stop"), faulty=True)
    assert trainer.state.global_step == ran.handle.nonfinite_steps[0] < 6
    with pytest.raises(FloatingPointError, match=r"step \d: model.layers.1.mlp.act_fn"):
        fine_tuned(callback(on_nonfinite="raise"), faulty=True)


def test_the_module_of_a_reentrant_block_is_named(callback):
    _, ran = fine_tuned(callback(), faulty=True, reentrant=True)
    assert ran.handle.incidents[0]["module"] == "model.layers.1.mlp.act_fn"


def test_a_rerun_that_is_finite_has_not_reproduced_a_failure(capsys):
    classifier(watch, faulty=True)
    with pytest.raises(SystemExit, match="2"):
        main(["incidents/step-4", "--model", f"{HERE}:Classifier"])
    assert "what failed is not in the model's passes" in capsys.readouterr().err
