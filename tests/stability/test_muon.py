import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from src.stability import RunFacts
from src.stability.muon import MuonAndAdamW, MuonConfig, hidden_matrices, orthogonalised
from src.train import main
from src.training.task import parameter_groups
from tests.builders import model_config, moe_config, transformer
from tests.runs import assert_same_tree, last_checkpoint, record
from tests.stability.harnessed import PACE, figure, first_difference, runs
from tests.stability.resumed import assert_resumed_is_whole, assert_sharded_is_refused
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=10, log_every=1, seed=0, repeat=0, clip_norm=None)
CONFIG = MuonConfig(momentum=0.95, num_iterations=5, update_rms=0.2)
RATE, DECAY = 0.02, 0.1


class Layers(torch.nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 6)
        self.tall, self.wide = torch.nn.Linear(6, 9, bias=False), torch.nn.Linear(9, 6)
        self.experts = torch.nn.Parameter(torch.randn(7, 5, 6))
        self.conv = torch.nn.Conv1d(6, 6, 3)
        self.frozen = torch.nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.lm_head = torch.nn.Linear(6, 11, bias=False)


HIDDEN = {"tall.weight", "wide.weight", "experts"}


def adamw(module: torch.nn.Module, **changes) -> torch.optim.AdamW:
    groups = parameter_groups(module.parameters(), weight_decay=DECAY, decay_params="matrices")
    return torch.optim.AdamW(groups, **({"lr": RATE, "betas": (0.9, 0.95)} | changes))


def muon(module: torch.nn.Module, config: MuonConfig = CONFIG) -> MuonAndAdamW:
    return config.replace_optimizer(adamw(module), module)


def gradients(module: torch.nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [{n: torch.randn(p.shape, generator=generator) for n, p in named} for _ in range(steps)]


def train(module, optimizer, all_gradients) -> None:
    named = dict(module.named_parameters())
    for step in all_gradients:
        for name, gradient in step.items():
            named[name].grad = gradient.clone()
        optimizer.step()


def test_matrices_move_bitwise_as_by_torchs_muon_and_the_rest_as_by_adamw():
    ours, theirs = Layers(), Layers()
    steps = gradients(ours, 6)
    train(ours, muon(ours), steps)
    others = torch.nn.ParameterDict(
        {n.replace(".", "/"): p for n, p in theirs.named_parameters() if n not in HIDDEN}
    )
    optimizers = [
        adamw(others),
        torch.optim.Muon(
            [theirs.tall.weight, theirs.wide.weight],
            lr=RATE,
            weight_decay=DECAY,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]
    named = dict(theirs.named_parameters())
    for step in steps:
        for name, gradient in step.items():
            named[name].grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in ours.named_parameters():
        if name != "experts":
            assert torch.equal(parameter, named[name]), name
    assert not torch.equal(ours.tall.weight, Layers().tall.weight)


def test_each_matrix_of_a_stack_moves_as_by_itself():
    ours, theirs = Layers(), Layers()
    steps = gradients(ours, 4)
    train(ours, muon(ours), steps)
    for index in range(7):
        alone = torch.nn.Parameter(theirs.experts.detach()[index].clone())
        optimizer = torch.optim.Muon(
            [alone], lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
        )
        for step in steps:
            alone.grad = step["experts"][index].clone()
            optimizer.step()
        # Products of a batch of matrices may round other last bits of bfloat16.
        torch.testing.assert_close(ours.experts[index], alone, rtol=0, atol=1e-3)


def test_an_update_has_the_papers_root_mean_square():
    """0.2 times the rate, for any shape; exact for orthogonal matrices."""
    for shape in ((64, 16), (16, 64), (32, 32)):
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.zeros(shape))
        before = module.weight.detach().clone()
        train(module, muon(module), gradients(module, 1))
        rms = (module.weight - before).square().mean().sqrt().item()
        # The iteration leaves singular values between about 0.7 and 1.2.
        assert 0.2 * RATE * 0.7 < rms < 0.2 * RATE * 1.2


def test_singular_values_become_one_nearly():
    draw = np.random.default_rng(0)
    for shape in ((8, 20), (20, 8), (4, 12, 12)):
        update = torch.from_numpy(draw.normal(size=shape)).float()
        values = torch.linalg.svdvals(orthogonalised(update, num_iterations=5).float())
        assert values.min() > 0.3 and values.max() < 1.3
        # It does not depend on the scale, and 0 stays 0.
        large = orthogonalised(update * 1024, num_iterations=5)
        torch.testing.assert_close(large, orthogonalised(update, num_iterations=5))
    assert not orthogonalised(torch.zeros(3, 4), num_iterations=5).any()


def test_which_parameters_are_matrices_of_hidden_layers():
    assert hidden_matrices(Layers()).keys() == HIDDEN
    for tied in (True, False):
        model = transformer(ffn=moe_config(), model=model_config(tie_embeddings=tied))
        hidden = hidden_matrices(model)
        assert not any("embedding" in name or "head" in name for name in hidden)
        assert any(parameter.dim() == 3 for parameter in hidden.values())
        assert all(parameter.dim() >= 2 for parameter in hidden.values())


@pytest.mark.parametrize("decay_params", ["all", "matrices"])
def test_every_trainable_parameter_is_in_exactly_one_group_with_its_decay(decay_params):
    model = transformer(ffn=moe_config())
    groups = parameter_groups(model.parameters(), weight_decay=DECAY, decay_params=decay_params)
    plain = torch.optim.AdamW(groups, lr=RATE)
    decay = {id(p): g["weight_decay"] for g in plain.param_groups for p in g["params"]}
    optimizer = CONFIG.replace_optimizer(plain, model)
    found = [(id(p), g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]]
    assert len(found) == len(decay)
    assert dict(found) == decay
    rules = [group["rule"] for group in optimizer.param_groups]
    assert rules == sorted(rules)
    assert optimizer.param_groups[0]["betas"] == plain.defaults["betas"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_and_resumed_is_uninterrupted(accumulate, tmp_path):
    whole = assert_resumed_is_whole(
        lambda: CONFIG.callbacks(FACTS),
        tmp_path / "s.ckpt",
        stop_at=3,
        recipe={"max_steps": 6, "accumulate": accumulate, "schedule": "linear"},
        replace_optimizer=CONFIG.replace_optimizer,
    )
    states = whole.states[-1]["optimizer"].values()
    assert {frozenset(state) for state in states} == {
        frozenset({"momentum_buffer"}),
        frozenset({"step", "exp_avg", "exp_avg_sq"}),
    }
    assert 0.3 < whole.recorder.lines[6]["stability/muon_params_frac"] < 1


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_leaves_weights_and_momentum_as_they_were(what):
    run = Harness(
        recipe=recipe_config(max_steps=5),
        callbacks=[Poison({3}, what=what)],
        replace_optimizer=CONFIG.replace_optimizer,
    ).fit()
    assert run.step_guard.summary()["skipped_steps"] == 1
    assert_same_tree(run.states[1], run.states[2])
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_the_guard_sees_weights_that_an_update_made_non_finite():
    """The optimizer is not one of torch's, so its updates are checked."""
    run = Harness(recipe=recipe_config(max_steps=3), replace_optimizer=CONFIG.replace_optimizer)

    class Spoil(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[0]
            original = optimizer._update

            def update(parameter, group):
                original(parameter, group)
                parameter.fill_(float("inf"))

            optimizer._update = update

    run.callbacks.append(Spoil())
    run.fit()
    assert run.step_guard.nonfinite_steps[0] == 1


def test_without_it_the_optimizer_is_adamw():
    run = Harness(recipe=recipe_config(max_steps=1)).fit()
    assert type(run.trainer.optimizers[0]) is torch.optim.AdamW


def test_muon_acts_and_its_rate_follows_the_schedule(tiny):
    plain, treated = runs(tiny, "muon", "recipe.schedule=cosine")
    assert first_difference(plain, treated) in (1, 2)
    assert record(treated)["outcome"] == "clean"
    assert figure(treated, "lr") == figure(plain, "lr")
    assert 0 < figure(treated, "stability/muon_params_frac")[22] < 1
    groups = last_checkpoint(treated)["optimizer_states"][0]["param_groups"]
    assert {group["rule"] for group in groups} == {"adamw", "muon"}
    assert len({group["lr"] for group in groups}) == 1


def test_adamws_own_remedies_act_on_the_rest(tiny):
    _, treated = runs(
        tiny, "[muon,adam_eps,beta2]", "stability.beta2.beta2=0.5", "stability.adam_eps.eps=1e-5"
    )
    assert set(figure(treated, "stability/adam_eps_value").values()) == {1e-5}
    assert set(figure(treated, "stability/beta2_value").values()) == {0.5}


def test_a_state_of_adamw_does_not_fit(tiny, capsys):
    plain, _ = runs(tiny, "beta2", "save_at=[5]")
    assert main([*tiny, *PACE, "stability=muon", "study=branch", f"fork={plain}@5"]) == 2
    assert (
        "stability=muon replaces the optimizer, and is off in that run" in capsys.readouterr().err
    )


def test_what_it_cannot_replace_is_refused():
    module = Layers()
    with pytest.raises(ValueError, match=r"optimizer=SGD: muon needs torch.optim.AdamW"):
        CONFIG.replace_optimizer(torch.optim.SGD(module.parameters(), lr=0.1), module)
    alone = torch.nn.Embedding(3, 2)
    with pytest.raises(ValueError, match="optimizer=muon: Embedding has no trainable matrix"):
        CONFIG.replace_optimizer(adamw(alone), alone)
    (callback,) = CONFIG.callbacks(FACTS)
    assert_sharded_is_refused(callback, "muon")
    with pytest.raises(ValueError, match=r"optimizer=AdamW: return muon\.replace_optimizer"):
        Harness(callbacks=CONFIG.callbacks(FACTS)).fit()


@pytest.mark.parametrize("change", [{"momentum": 1.0}, {"num_iterations": 0}, {"update_rms": 0.0}])
def test_impossible_values_are_named(change):
    ((name, value),) = change.items()
    values = {"momentum": 0.95, "num_iterations": 5, "update_rms": 0.2} | change
    with pytest.raises(ValueError, match=f"^{name}={value}"):
        MuonConfig(**values)
