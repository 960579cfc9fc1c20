"""Models and loops that are unlike the plain one, each with one thing that real ones have."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from nonfinite import Watch, watch
from nonfinite.__main__ import main
from tests.nonfinite.watched import (
    NAMED,
    Divides,
    batch,
    cause_and_line,
    loop,
    normed,
    same,
    sgd,
    small,
    state_of,
    unwatched,
)

HERE = "tests.nonfinite.test_watched_models"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
