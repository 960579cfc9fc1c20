"""`watch` in training scripts as people have them, with and without a planted fault.

Each script runs unchanged, with `watch` added, and with a fault of its own. What follows are loops
of a few lines, each with one thing that real loops do.
"""

import copy
import html
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from nonfinite import Watch, watch
from nonfinite.__main__ import main
from tests.forked import python

HERE = "tests.nonfinite.test_scripts"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def unwatched(model: nn.Module, optimizer: Any) -> None:
    """Replaces `watch` in an unchanged script."""


@dataclass
class Ran:
    """What a script leaves: its handles, what it measured, and its state after each step."""

    handles: list[Watch | None]
    measured: list[Any]
    states: list[list[Any]]

    @property
    def handle(self) -> Watch:
        """The handle that saw a step that was not finite."""
        (found,) = [h for h in self.handles if h is not None and h.nonfinite_steps]
        return found


def state_of(*parts: Any) -> list[Any]:
    """A copy of weights, buffers and optimizer state; not of the rate, which is the schedule's."""
    states = [part.state_dict() for part in parts]
    return copy.deepcopy([state.get("state", state) for state in states])


def same(one: Any, other: Any) -> bool:
    """Bitwise equality at any depth; NaN equals NaN."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or repr(one) == repr(other)


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


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


class Divides(nn.Module):
    """Divides each row by its norm, which is 0 for a row of zeros."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return self.inner(x) / x.norm(dim=1, keepdim=True)


THE_DIVISION = "return self.inner(x) / x.norm(dim=1, keepdim=True)"


def sgd(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters() if p.requires_grad], lr=0.1)


def batch(number: int, *, at: int = 2, bad: Any = 0.0) -> torch.Tensor:
    """Eight rows, of which one holds `bad` in the batch with the number `at`."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
    if number == at:
        x[3] = bad
    return x


def loop(model: nn.Module, *optimizers: Any, called: Any = None, at: int = 2, bad: Any = 0.0):
    """Four steps; returns the states before and after each."""
    states = [state_of(model, *optimizers)]
    call = model if called is None else called
    for number in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        output = call(batch(number, at=at, bad=bad))
        output.pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        states.append(state_of(model, *optimizers))
    return states


def cause_and_line(handle: Watch) -> tuple[str, str | None]:
    (incident,) = handle.incidents
    source = incident["source"]
    return incident["cause"], None if source is None else source["code"]


NAMED = ("division by zero", THE_DIVISION)


def test_a_step_is_skipped_or_applied_as_the_page_says():
    for choice, finite, left_out in [
        ("skip", [3], [3]),
        ("stop", [3], [3, 4]),
        ("warn", [3, 4], []),
    ]:
        model = normed()
        optimizer = torch.optim.Adam(model.parameters())
        handle = watch(model, optimizer, on_nonfinite=choice)
        states = loop(model, optimizer, bad=torch.nan)
        assert handle.nonfinite_steps == finite
        assert [n for n in range(1, 5) if same(states[n], states[n - 1])] == left_out
        assert handle.stopped == (choice == "stop")
        assert cause_and_line(handle)[0] == "bad batch"


def test_a_step_raises_with_the_line_that_is_printed(capsys):
    model = normed()
    optimizer = torch.optim.Adam(model.parameters())
    watch(model, optimizer, on_nonfinite="raise")
    with pytest.raises(FloatingPointError) as raised:
        loop(model, optimizer, bad=torch.nan)
    assert str(raised.value) == capsys.readouterr().err.splitlines()[0]
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_who_catches_the_error_has_sound_buffers():
    model = normed()
    optimizer = sgd(model)
    watch(model, optimizer, on_nonfinite="raise")
    with pytest.raises(FloatingPointError):
        loop(model, optimizer, bad=torch.nan)
    assert all(buffer.isfinite().all() for buffer in model.buffers())


OPTIMIZERS = [
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.AdamW, {"amsgrad": True}),
    *((kind, {}) for kind in (torch.optim.Adagrad, torch.optim.Rprop, torch.optim.Adafactor)),
    *((kind, {}) for kind in (torch.optim.NAdam, torch.optim.Adadelta, torch.optim.ASGD)),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_torchs_optimizers_leave_a_skipped_step_out(kind, options):
    model = normed()
    optimizer = kind(model.parameters(), lr=0.01, **options)
    handle = watch(model, optimizer)
    states = loop(model, optimizer, bad=torch.nan)
    assert handle.nonfinite_steps == [3]
    assert [same(*pair) for pair in zip(states[1:], states, strict=False)] == [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_is_checked_after_it_has_run(by_name):
    model = small()
    optimizer = torch.optim.Adam(model.parameters())
    handle = watch(model, optimizer)
    states = [state_of(model, optimizer)]
    for number in range(4):

        def closure(number=number):
            optimizer.zero_grad()
            loss = model(batch(number, bad=torch.inf)).mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert isinstance(loss, torch.Tensor)
        states.append(state_of(model, optimizer))
    assert same(states[3], states[2]) and not same(states[4], states[3])
    assert handle.nonfinite_steps == [3] and cause_and_line(handle)[0] == "bad batch"


@pytest.mark.parametrize("how", ["wrapped", "before it was compiled", "in place"])
def test_a_compiled_model(how):
    torch._dynamo.reset()
    model = Divides()
    optimizer = sgd(model)
    if how == "in place":
        model.compile(backend="eager")
        called = model
    else:
        called = torch.compile(model, backend="eager")
    handle = watch(called if how == "wrapped" else model, optimizer)
    states = loop(model, optimizer, called=called)
    assert cause_and_line(handle) == NAMED
    assert same(states[3], states[2]) and not same(states[4], states[3])


def test_an_incident_of_a_compiled_model_is_run_again(capsys):
    torch._dynamo.reset()
    model = Divides()
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="eager")
    watch(compiled, optimizer)
    loop(model, optimizer, called=compiled)
    assert main(["incidents/step-3", "--model", f"{HERE}:Divides"]) == 0
    assert "reproduced" in capsys.readouterr().out


class Tied(Divides):
    """Two layers with one weight between which a third is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.inner.weight

    def forward(self, x):
        return super().forward(x) + self.second(self.frozen(x))


def test_tied_and_frozen_weights(capsys):
    model = Tied()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    states = loop(model, optimizer)
    assert cause_and_line(handle) == NAMED
    assert same(states[3], states[2])
    assert main(["incidents/step-3", "--model", f"{HERE}:Tied"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reproduced, bitwise"


@pytest.mark.parametrize("bad", ["first", "second"])
def test_a_model_that_is_called_twice_in_a_step(bad):
    model = Divides()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(4):
        optimizer.zero_grad()
        pair = batch(number), batch(number + 10)
        one, other = map(model, pair if bad == "first" else pair[::-1])
        (one - other).pow(2).mean().backward()
        optimizer.step()
    assert handle.nonfinite_steps == [3]
    assert cause_and_line(handle) == NAMED


def test_two_watches_do_not_see_each_other():
    models = Divides(), small()
    optimizers = [sgd(model) for model in models]
    handles = [
        watch(m, o, folder=name) for m, o, name in zip(models, optimizers, "ab", strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        loop(model, optimizer)
    assert [handle.nonfinite_steps for handle in handles] == [[3], []]
    assert cause_and_line(handles[0]) == NAMED


def test_two_steps_of_one_model_by_two_optimizers():
    model = small()
    optimizers = sgd(model[0]), sgd(model[2])
    handle = watch(model, optimizers)
    states = loop(model, *optimizers, bad=torch.nan)
    assert same(states[3], states[2]) and not same(states[4], states[3])
    assert cause_and_line(handle)[0] == "bad batch"
    assert handle.summary()["steps"] == 4


def scaled(model: nn.Module, optimizer: Any, *, scale: float, fail: Callable[[int], bool]) -> float:
    """Forty steps in float16 with a GradScaler that looks at the gradient before it is clipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for number in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch(number, at=-1)).float().mean()
        loss = loss / (loss - loss) if fail(number) else loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True])
def test_overflows_of_a_scaler_are_no_incident(fused):
    def trained(add):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        handle = add(model, optimizer)
        scale = scaled(model, optimizer, scale=2.0**30, fail=lambda number: False)
        return handle, scale, state_of(model, optimizer)

    _, scale, plain = trained(unwatched)
    handle, _, watched = trained(watch)
    assert scale < 2.0**30
    assert handle.incidents == []
    assert same(watched, plain)


def test_a_loss_that_stays_non_finite_under_a_scaler_is_an_incident():
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    assert scaled(model, optimizer, scale=16.0, fail=lambda number: number > 1) < 1e-8
    assert handle.incidents


def test_what_is_not_supported_is_refused_in_one_line():
    model, optimizer = small(), sgd(small())
    lbfgs = torch.optim.LBFGS(model.parameters())
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    wrong: list[tuple[tuple[Any, Any], dict[str, Any], str]] = [
        ((model, lbfgs), {}, r"optimizer: LBFGS computes the gradient several times a step; use"),
        ((optimizer, model), {}, r"model: is a SGD; must be a torch.nn.Module"),
        ((lambda x: x, optimizer), {}, r"model: is a function"),
        ((model, None), {}, r"optimizer: is a NoneType; must be a torch optimizer"),
        ((model, model.parameters()), {}, r"optimizer: is a generator"),
        ((model, [optimizer, schedule]), {}, r"optimizer: is a StepLR"),
        ((model, optimizer), {"on_nonfinite": "ignore"}, r"on_nonfinite=ignore: must be one of"),
    ]
    for given, options, line in wrong:
        with pytest.raises((TypeError, ValueError), match=line) as refused:
            watch(*given, **options)
        assert "\n" not in str(refused.value)
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("optimizers", "options"),
    [
        ([], {}),
        (sgd(small()), {}),
        (None, {"loss_of": 3}),
        (None, {"say": 3}),
    ],
    ids=["no optimizer", "an optimizer of another model", "loss_of", "say"],
)
def test_other_wrong_arguments_are_refused(optimizers, options):
    model = small()
    with pytest.raises((TypeError, ValueError)):
        watch(model, sgd(model) if optimizers is None else optimizers, **options)


def test_the_loss_is_examined_with_loss_of(capsys):
    model, targets = small(), torch.zeros(0)
    optimizer = sgd(model)
    handle = watch(model, optimizer, loss_of=lambda output: (output / targets.norm()).mean())
    for number in range(4):
        targets = torch.full((3,), float(number != 2))
        optimizer.zero_grad()
        (model(batch(number, at=-1)) / targets.norm()).mean().backward()
        optimizer.step()
    cause, code = cause_and_line(handle)
    assert cause == "division by zero" and "loss_of=lambda" in code


def test_loss_of_is_asked_for_the_last_micro_batch_alone():
    model, targets = small(), torch.zeros(0)
    optimizer = sgd(model)
    handle = watch(model, optimizer, loss_of=lambda output: (output / targets.norm()).mean())
    for number in range(8):
        targets = torch.full((3,), float(number != 4))
        (model(batch(number, at=-1)) / targets.norm()).mean().backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
    # The targets of the micro-batch are gone when the step is run again.
    assert cause_and_line(handle)[0] == "loss outside the model"


def test_loss_of_is_not_given_an_evaluation():
    model, targets = small(), torch.zeros(0)
    optimizer = sgd(model)
    handle = watch(model, optimizer, loss_of=lambda output: ((output - targets) / targets).mean())
    for number in range(4):
        model(torch.randn(20, 4))  # an evaluation without no_grad
        targets = torch.full((8, 3), float(number != 2))
        optimizer.zero_grad()
        ((model(batch(number, at=-1)) - targets) / targets).mean().backward()
        optimizer.step()
    assert cause_and_line(handle)[0] == "division by zero"


def test_an_embedding_with_sparse_gradients():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    optimizer = sgd(model)
    watch(model, optimizer)
    model(torch.randint(10, (5,))).mean().backward()
    optimizer.step()


def test_a_watched_model_is_saved_whole():
    model = small()
    watch(model, sgd(model))
    torch.save(model, io.BytesIO())


def test_a_copy_of_a_watched_model_is_not_watched():
    model = small()
    handle = watch(model, sgd(model))
    average = copy.deepcopy(model)
    average(batch(0))
    assert not handle._calls


class Gaussian(nn.Module):
    """A policy that returns a weight of its own, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(4, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.mean(x), self.log_std


def test_a_weight_that_is_returned_keeps_no_hooks():
    model = Gaussian()
    optimizer = sgd(model)
    with watch(model, optimizer):
        loop(model, optimizer, called=lambda x: sum(model(x)), at=-1)
    assert not model.log_std._backward_hooks


class Counts(nn.Module):
    """Batch normalisation written by hand: its buffers change without a version."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        return self.inner(F.batch_norm(x, self.mean, self.var, training=self.training))


@pytest.mark.parametrize(
    "make",
    [
        normed,
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 1)),
        Counts,
    ],
    ids=["batch norm", "spectral norm", "own batch norm"],
)
def test_buffers_are_those_before_the_skipped_step(make):
    model = make()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    states = loop(model, optimizer, bad=torch.nan)
    assert handle.nonfinite_steps == [3]
    assert same(states[3], states[2])


class Agent(nn.Module):
    """Is never called itself, only by its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.net = normed()

    def value(self, x):
        return self.net(x)


def test_a_model_that_is_only_called_by_its_methods():
    model = Agent()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    states = loop(model, optimizer, called=model.value, bad=torch.nan)
    assert handle.nonfinite_steps == [3]
    assert same(states[3], states[2])


class Either(Agent):
    """Is called itself, or by a method."""

    def forward(self, x):
        return self.net(x)


def test_a_model_that_is_called_itself_or_by_a_method_gets_its_buffers_back():
    """The copies from before the last call of the model itself are too old by then."""
    model = Either()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    states = []
    for number in range(1, 9):
        called = model if number in (1, 2, 5, 8) else model.value
        bad = torch.nan if number in (3, 7) else 0.0
        called(batch(number, at=number, bad=bad)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(state_of(model, optimizer))
    assert handle.nonfinite_steps == [3, 7]
    # Step 3 is the first by a method: only what it damaged is put back.
    buffers = states[2][0]
    assert all(value.isfinite().all() for value in buffers.values())
    assert buffers["net.1.num_batches_tracked"] == 3
    assert same(states[6], states[5])


class Heads(nn.Module):
    """Two heads, of which one divides."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.divides = nn.Linear(4, 4), Divides()

    def forward(self, x):
        return self.plain(x) + 0 * x, self.divides(x)


def test_no_part_of_a_skipped_step_is_applied():
    model = Heads()
    optimizers = sgd(model.plain), sgd(model.divides)
    watch(model, optimizers)
    states = loop(model, *optimizers, called=lambda x: torch.cat(model(x)))
    assert same(states[3], states[2])


def test_a_step_of_two_optimizers_is_one_step():
    model = small()
    optimizers = sgd(model[0]), sgd(model[2])
    handle = watch(model, optimizers)
    loop(model, *optimizers, bad=torch.nan)
    assert handle.summary()["nonfinite_steps"] == [3]
    assert handle.summary()["skipped_steps"] == 1


def test_two_optimizers_of_unlike_gradients_make_no_spike():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-6) for part in model]
    handle = watch(model, optimizers)
    for number in range(6):
        for optimizer in optimizers:
            optimizer.zero_grad()
        (model(batch(number, at=-1)).mean() + 100 * model[1].weight.sum()).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert handle.incidents == []


def test_two_models_that_share_an_optimizer_are_refused():
    encoder, decoder = nn.Linear(4, 4, bias=False), Divides()
    optimizer = sgd(encoder, decoder)
    handle = watch(encoder, optimizer)
    with pytest.raises(ValueError, match="optimizer: is watched already; for several models"):
        watch(decoder, optimizer)
    handle.close()
    watch(decoder, optimizer)


def test_two_watches_keep_their_incidents_apart():
    models = Divides(), Divides()
    optimizers = [sgd(model) for model in models]
    handles = list(map(watch, models, optimizers))
    for model, optimizer in zip(models, optimizers, strict=True):
        loop(model, optimizer)
    assert len({handle.incidents[0]["next"] for handle in handles}) == 2


def test_own_clipping_that_divides_by_zero_is_named():
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(4):
        optimizer.zero_grad()
        (model(batch(number)).mean() * (number != 2)).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(1 / norm)
        optimizer.step()
    assert cause_and_line(handle)[0] == "not reproduced"
    assert "by clipping" in handle.incidents[0]["explanation"]


class Frozen(Divides):
    """Its batch normalisation stays in evaluation, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_a_part_that_stays_in_evaluation_is_run_again_so():
    model = Frozen()
    model.norm.eval()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    loop(model, optimizer)
    assert not model.norm.training
    assert cause_and_line(handle) == NAMED


def test_two_backward_passes_through_one_output():
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(4):
        optimizer.zero_grad()
        output = model(batch(number, at=-1))
        (output / float(number != 2)).mean().backward(retain_graph=True)
        output.mean().backward()
        optimizer.step()
    assert cause_and_line(handle)[0] == "loss outside the model"


def test_a_gradient_penalty_of_norm_0():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(4):
        x = batch(number, at=-1).requires_grad_()
        output = model(x) * float(number != 2)
        (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
        optimizer.zero_grad()
        (output.mean() + (slope.pow(2).sum(1).sqrt() - 1).pow(2).mean()).backward()
        optimizer.step()
    assert cause_and_line(handle)[0] == "not reproduced"
    assert "gradient penalty" in handle.incidents[0]["explanation"]


def test_a_loss_that_is_nan_with_finite_gradients_is_mentioned():
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    loss = F.cross_entropy(model(batch(0)), torch.full((8,), -100))
    loss.backward()
    optimizer.step()
    assert loss.isnan()
    # No weight is harmed, as the page says.
    assert not handle.incidents


class DeadFeatures(nn.Module):
    """Returns its loss, which is NaN where ReLU has no slope: every gradient is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)
        nn.init.constant_(self.inner.weight, 0.5)

    def forward(self, x):
        features = F.relu(self.inner(x))
        return (features / features.amax(-1, keepdim=True) * features).mean()


def test_a_loss_of_the_model_that_is_nan_with_finite_gradients_is_an_incident():
    torch.manual_seed(0)
    model = DeadFeatures()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    states = []
    for number in range(1, 5):
        loss = model(batch(number, at=3).abs())
        loss.backward()
        assert loss.isfinite() or all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        states.append(state_of(model, optimizer))
    assert handle.nonfinite_steps == [3]
    assert cause_and_line(handle)[0] == "division by zero"
    assert same(states[2], states[1])


def test_a_rerun_that_is_finite_has_not_reproduced_a_failure(capsys):
    classifier(watch, faulty=True)
    with pytest.raises(SystemExit, match="2"):
        main(["incidents/step-4", "--model", f"{HERE}:Classifier"])
    assert "what failed is not in the model's passes" in capsys.readouterr().err


def distributed(rank: int, world: int, store: str, bad_rank: int | None, add: bool) -> None:
    """One process of a distributed run, which writes what it has to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    place = f"file://{store}"
    torch.distributed.init_process_group("gloo", place, rank=rank, world_size=world)
    try:
        model = nn.Sequential(normed()[:2], Divides(8))
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        handle = watch(parallel, optimizer) if add else None
        bad = torch.nan if rank == bad_rank else None
        states = loop(model, optimizer, called=parallel, at=2 if rank == bad_rank else -1, bad=bad)
        incidents = [] if handle is None else handle.incidents
        torch.save((states, incidents), f"{store}-{rank}")
    finally:
        torch.distributed.destroy_process_group()


def ran_distributed(world: int, bad_rank: int | None = None, *, add: bool = True) -> list[Any]:
    store = str(Path(f"store-{world}-{bad_rank}-{add}").absolute())
    if world == 1:
        distributed(0, 1, store, bad_rank, add)
    else:
        torch.multiprocessing.spawn(distributed, (world, store, bad_rank, add), nprocs=world)
    return [torch.load(f"{store}-{rank}") for rank in range(world)]


WORLDS = [1, pytest.param(2, marks=pytest.mark.slow)]


@pytest.mark.parametrize("world", WORLDS)
def test_distributed_processes_end_with_the_same_bits(world):
    plain, watched = ran_distributed(world, add=False), ran_distributed(world)
    assert same([states for states, _ in watched], [states for states, _ in plain])
    assert not any(incidents for _, incidents in watched)


@pytest.mark.parametrize("world", WORLDS)
def test_the_process_with_the_bad_row_names_it(world):
    for rank, (states, incidents) in enumerate(ran_distributed(world, world - 1)):
        assert same(states[3], states[2]) and not same(states[4], states[3])
        assert [incident["step"] for incident in incidents] == [3]
        assert rank < world - 1 or incidents[0]["cause"] == "bad batch"


@pytest.mark.slow
def test_the_saved_incident_is_that_of_the_process_with_the_bad_row():
    ran_distributed(2, 1)
    assert "bad batch" in Path("incidents/step-3/incident.html").read_text()


def prompted(add: Callable) -> tuple[Watch | None, list[torch.Tensor]]:
    """A learned prompt outside of the model; the gradient of the eighth step is large."""
    model, prompt = small(), nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([*model.parameters(), prompt], lr=0.01)
    handle = add(model, optimizer)
    kept = []
    for number in range(9):
        optimizer.zero_grad()
        loss = model(batch(number, at=-1) + prompt).pow(2).mean()
        (loss * (1000 if number == 7 else 1)).backward()
        optimizer.step()
        kept.append(prompt.detach().clone())
    return handle, kept


def test_a_spike_leaves_the_numbers_of_the_loop():
    _, plain = prompted(unwatched)
    handle, watched = prompted(watch)
    assert [incident["kind"] for incident in handle.incidents] == ["spike"]
    assert same(watched, plain)


class Root(nn.Module):
    """Its derivative, and not its value, is infinite for a row of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.inner(x).abs().sqrt()


def test_an_input_that_another_model_made():
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 4, bias=False), Root()
    optimizers = sgd(encoder), sgd(decoder)
    handle = watch(decoder, optimizers[1])
    loop(decoder, *optimizers, called=lambda x: decoder(encoder(x).tanh()))
    assert cause_and_line(handle)[0] == "infinite slope at the edge of the domain"


@pytest.mark.parametrize("length", [10, 100])
def test_an_episode_with_one_pass_for_each_of_its_steps(length):
    model = normed()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(3):
        optimizer.zero_grad()
        before = state_of(model, optimizer)
        outputs = [
            model(batch(n, at=5 if number == 1 else -1, bad=torch.nan)) for n in range(length)
        ]
        torch.stack(outputs).mean().backward()
        optimizer.step()
        assert same(state_of(model, optimizer), before) == (number == 1)
    assert cause_and_line(handle)[0] == "bad batch"


class Cell(nn.Module):
    """One step of a recurrent network, which is called in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 4), Divides()

    def forward(self, x, state):
        state = self.cell(x, state)
        return self.out(x), state


def test_a_cell_that_is_called_in_a_loop():
    model = Cell()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(3):
        state, outputs = torch.zeros(8, 4), []
        for n in range(4):
            output, state = model(batch(n, at=2 if number == 1 else -1), state)
            outputs.append(output + state)
        optimizer.zero_grad()
        torch.stack(outputs).pow(2).mean().backward()
        optimizer.step()
    assert cause_and_line(handle) == NAMED


class Centres(Divides):
    """Changes its input in place."""

    def forward(self, x):
        return self.inner(x.sub_(x.mean(1, keepdim=True)).div_(x.std(1, keepdim=True)))


def test_a_model_that_changes_its_input():
    model = Centres()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    loop(model, optimizer, bad=3.0)
    assert cause_and_line(handle)[0] == "not reproduced"
    assert "changed in place" in handle.incidents[0]["explanation"]


def test_steps_without_a_gradient_make_no_spike_of_the_next():
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    for number in range(8):
        optimizer.zero_grad()
        (model(batch(number, at=-1)).mean() * (number > 5)).backward()
        optimizer.step()
    assert handle.incidents == []
