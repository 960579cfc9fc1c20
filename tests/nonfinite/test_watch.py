"""What `watch` does with a step, an optimizer, a scaler, a closure; what it refuses."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nonfinite import watch
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

HERE = "tests.nonfinite.watched"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def scaled(
    model: nn.Module,
    optimizer: Any,
    *,
    scale: float,
    fail: Callable[[int], bool],
    drops_late: bool = False,
) -> float:
    """Forty steps in float16 with a GradScaler that looks at the gradient before it is clipped.

    The gradients of the step before are dropped before the forward pass, or only after it.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for number in range(40):
        if not drops_late:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch(number, at=-1)).float().mean()
        loss = loss / (loss - loss) if fail(number) else loss
        if drops_late:
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize("drops_late", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_overflows_of_a_scaler_are_no_incident(fused, drops_late):
    def trained(add):
        model = small()
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        handle = add(model, optimizer)
        scale = scaled(
            model, optimizer, scale=2.0**30, fail=lambda number: False, drops_late=drops_late
        )
        return handle, scale, state_of(model, optimizer)

    _, scale, plain = trained(unwatched)
    handle, _, watched = trained(watch)
    assert scale < 2.0**30
    assert handle.incidents == []
    assert same(watched, plain)


@pytest.mark.parametrize("drops_late", [False, True])
def test_a_loss_that_stays_non_finite_under_a_scaler_is_an_incident(drops_late):
    model = small()
    optimizer = sgd(model)
    handle = watch(model, optimizer)
    fails = {"fail": lambda number: number > 1, "drops_late": drops_late}
    assert scaled(model, optimizer, scale=16.0, **fails) < 1e-8
    assert handle.incidents
    # The last steps are counted as the next one begins, of which there is none.
    last = 39 if not drops_late else 38
    assert handle.nonfinite_steps == list(range(3, last + 1))
    assert "left out by the GradScaler, the first at step 3" in handle.closing_line()


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
