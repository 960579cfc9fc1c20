import pytest
import torch

from src.common.errors import InputError
from src.config.compose import compose
from src.model.rope import RotaryTable
from src.stability import REMEDIES, QKClipConfig, RunFacts
from tests.builders import DIMS, gqa_config, mlha_config, transformer
from tests.runs import assert_same_tree, weights
from tests.stability.harnessed import figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)
TIME = 7
CASES = {
    "gqa": gqa_config(),
    "multi-head": gqa_config(num_kv_heads=4, rope_dim=6),
    "mlha": mlha_config(),
    "mlha-latent-norm": mlha_config(latent_norm=True),
    "mlha-two-rope-keys": mlha_config(num_rope_keys=2),
    "mlha-all-rotated": mlha_config(rope_dim=10),
}


def layer(config):
    """An attention layer with scores of different sizes in its heads."""
    made = config.build(DIMS).train()
    draw = torch.Generator().manual_seed(0)
    for weight in made.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.4, generator=draw)
    projection = made.q_proj if hasattr(made, "q_proj") else made.q_up
    with torch.no_grad():
        projection.weight.unflatten(0, (4, -1)).mul_(torch.tensor([1.0, 2, 3, 4])[:, None, None])
    return made


def peaks(made, config) -> torch.Tensor:
    made.watch_scores()
    rope = RotaryTable(rope_dim=config.rope_dim, max_seq_len=TIME, theta=1e4)(TIME)
    x_BTD = torch.randn(3, TIME, DIMS.hidden_dim, generator=torch.Generator().manual_seed(1))
    made(x_BTD, rope)
    return made.peaks_H.clone()


@pytest.mark.parametrize("name", CASES)
def test_scaling_scales_the_scores_of_each_head(name):
    made = layer(CASES[name])
    before = peaks(made, CASES[name])
    assert before.unique().numel() == 4 and before.min() > 0
    factors = torch.tensor([1.0, 0.5, 0.25, 0.04])
    values = made.v_proj if hasattr(made, "v_proj") else made.v_up
    kept = values.weight.clone()
    made.scale_scores(factors)
    # Two heads share a key in `gqa`, and go by the smaller of their factors.
    expected = torch.tensor([0.5, 0.5, 0.04, 0.04]) if name == "gqa" else factors
    torch.testing.assert_close(peaks(made, CASES[name]), before * expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(values.weight, kept)


def test_the_shared_weights_of_latent_attention_stay():
    """Kimi K2, section 2.1: content parts by the root, rotated queries in full."""
    config = mlha_config()
    made, factors = layer(config), torch.tensor([1.0, 0.25, 0.25, 0.01])
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    made.scale_scores(factors)
    for name, weight in made.named_parameters():
        if name not in ("q_up.weight", "k_up.weight"):
            assert torch.equal(weight, before[name]), name
    content, head = 6, 10
    for number, factor in enumerate(factors.tolist()):
        rows = slice(number * head, number * head + content)
        rotated = slice(number * head + content, (number + 1) * head)
        keys = slice(number * content, (number + 1) * content)
        for weight, place, by in (
            ("q_up.weight", rows, factor**0.5),
            ("q_up.weight", rotated, factor),
            ("k_up.weight", keys, factor**0.5),
        ):
            found = made.get_parameter(weight)[place]
            torch.testing.assert_close(found, before[weight][place] * by)


def test_queries_and_keys_of_a_group_are_scaled_alike():
    made = layer(gqa_config())
    before = {name: weight.clone() for name, weight in made.named_parameters()}
    made.scale_scores(torch.tensor([1.0, 0.25, 1.0, 1.0]))
    for name, rows in (("q_proj.weight", 20), ("k_proj.weight", 10)):
        weight = made.get_parameter(name)
        torch.testing.assert_close(weight[:rows], before[name][:rows] * 0.5)
        assert torch.equal(weight[rows:], before[name][rows:])


@pytest.mark.parametrize("name", ["gqa", "mlha"])
def test_a_peak_is_the_largest_score_that_a_query_sees(name):
    config = CASES[name]
    made, seen = layer(config), []
    made._watch = lambda q, k: seen.append((q.detach(), k.detach()))
    peaks(made, config)
    ((q, k),) = seen
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    expected = [
        max(
            float(q[row, head, i] @ k[row, head, j]) / 10**0.5
            for row in range(3)
            for i in range(TIME)
            for j in range(i + 1)
        )
        for head in range(4)
    ]
    torch.testing.assert_close(peaks(layer(config), config), torch.tensor(expected))


def test_only_training_is_watched_and_only_if_asked():
    config = gqa_config()
    made = layer(config)
    assert made.peaks_H is None and "peaks_H" not in made.state_dict()
    assert peaks(made.eval(), config).max() < 0
    assert "peaks_H" not in made.state_dict()


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_it_acts_after_the_first_step(attention, tiny):
    typed = (f"attention={attention}", "stability.qk_clip.threshold=0.001")
    plain, treated = runs(tiny, "qk_clip", *typed)
    # The first step's numbers are the baseline's; its weights are scaled afterwards.
    assert first_difference(plain, treated) == 2
    figures = {n: figure(treated, f"stability/qk_clip_{n}") for n in ("peak", "heads", "total")}
    assert figures["heads"][1] > 0
    assert figures["total"][22] == sum(figures["heads"].values())
    assert all(figures["peak"][step] > 0 for step in range(1, 23))
    assert figure(plain, "stability/qk_clip_peak") == {}


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_a_threshold_that_is_never_reached_is_the_baseline_bit_by_bit(attention, tiny):
    plain, treated = runs(tiny, "qk_clip", f"attention={attention}")
    assert first_difference(plain, treated) is None
    assert_same_tree(weights(plain), weights(treated))
    assert set(figure(treated, "stability/qk_clip_total").values()) == {0.0}
    assert 0 < figure(treated, "stability/qk_clip_peak")[22] < 100


class Scaled(Poison):
    """Keeps the peaks of each micro-batch and the factors of each step."""

    def on_train_start(self, trainer, pl_module):
        self.factors, self.peaks = [], []
        self.layer = pl_module.model.blocks()[0].attention
        scale, watch = self.layer.scale_scores, self.layer._watch

        def scale_scores(factors):
            self.factors.append(factors.clone())
            scale(factors)

        def watch_scores(query, key):
            scores = query.detach() @ key.detach().transpose(2, 3) / query.shape[-1] ** 0.5
            later = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
            self.peaks.append(scores.masked_fill(later, -1e9).amax(dim=(0, 2, 3)))
            watch(query, key)

        self.layer.scale_scores, self.layer._watch = scale_scores, watch_scores


def fitted(threshold: float, *others, what=None, **changes):
    (callback,) = QKClipConfig(threshold=threshold).callbacks(FACTS)
    model = transformer(attention=gqa_config(num_kv_heads=4), max_seq_len=8)
    steps = {2} if what else set()
    scaled = Scaled(steps, what=what or "none", at="layers.0.attention_norm.weight")
    recipe = recipe_config(**changes)
    run = Harness(recipe=recipe, callbacks=[callback, scaled, *others], model=model).fit()
    return run, scaled, callback


def test_the_peak_of_a_step_is_that_of_all_its_micro_batches():
    threshold = 0.3
    run, scaled, callback = fitted(threshold, accumulate=3)
    assert len(scaled.factors) == 6 and len(scaled.peaks) == 18
    for step, factors in enumerate(scaled.factors):
        largest = torch.stack(scaled.peaks[3 * step : 3 * step + 3]).amax(dim=0)
        expected = torch.where(largest > threshold, threshold / largest, 1.0)
        torch.testing.assert_close(factors, expected)
    assert any(factors.min() < 1 for factors in scaled.factors)
    lines = run.recorder.lines
    assert lines[6]["stability/qk_clip_total"] == int(callback.total) > 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_and_its_nan_scale_nothing(what):
    run, scaled, _ = fitted(0.01, what=what)
    assert run.recorder.lines[2]["guard/skipped"] == 1
    assert torch.equal(scaled.factors[1], torch.ones(4))
    # NaN in the forward pass is forgotten with the step; beside a NaN gradient, scores are sound.
    assert ("stability/qk_clip_peak" in run.recorder.lines[2]) == (what == "gradient")
    assert scaled.factors[2].min() < 1
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


@pytest.mark.parametrize("peak", [float("nan"), float("inf")])
def test_a_peak_that_is_not_finite_scales_nothing(peak):
    """Without a guard nothing else would stop it: 100 / inf would set the weights to 0."""

    class Spoil(Poison):
        def on_after_backward(self, trainer, pl_module):
            for block in pl_module.model.blocks():
                block.attention.peaks_H.fill_(peak)

    _, scaled, callback = fitted(0.01, Spoil(set(), what="none"))
    assert all(torch.equal(factors, torch.ones(4)) for factors in scaled.factors)
    assert int(callback.total) == 0


def test_the_number_of_scaled_heads_is_saved_and_restored():
    _, _, callback = fitted(0.3)
    (again,) = QKClipConfig(threshold=0.3).callbacks(FACTS)
    again.load_state_dict(callback.state_dict())
    assert int(again.total) == int(callback.total) > 0


def test_an_average_of_weights_is_one_of_scaled_weights():
    order = list(REMEDIES)
    assert order.index("qk_clip") < order.index("ema")


def test_norms_on_queries_and_keys_and_external_models_are_refused():
    for attention in ("gqa", "mlha"):
        typed = [f"attention={attention}", "attention.qk_norm=true", "stability=qk_clip"]
        with pytest.raises(InputError, match=r"^attention.qk_norm=true: stability=qk_clip needs"):
            compose("train", typed)
    external = ["model=external", "model.target=src.examples.mlp:build"]
    with pytest.raises(InputError, match=r"qk_clip: needs attention.rope_dim, which"):
        compose("train", [*external, "stability=qk_clip"])
