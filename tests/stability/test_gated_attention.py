"""tests/model checks decoding, causality and sizes with a gate."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from src.checkpoint.trained_model import load_trained
from src.common.errors import InputError
from src.config.compose import compose
from src.model.rope import RotaryTable
from src.model.size import measure
from src.stability import GatedAttentionConfig, RunFacts
from src.train import main
from tests.builders import DIMS, gqa_config, mlha_config, model_config, moe_config, transformer
from tests.runs import record, train
from tests.stability.harnessed import PACE, figure, first_difference, runs
from tests.training.harness import Harness, Poison, recipe_config

FACTS = RunFacts(max_steps=6, log_every=1, seed=0, repeat=0, clip_norm=1.0)


def test_the_gate_is_that_of_qwen3_next():
    config = gqa_config(qk_norm=True, rope_dim=6, gated=True)
    ours = config.build(DIMS)
    theirs = Qwen3NextAttention(
        Qwen3NextConfig(
            hidden_size=DIMS.hidden_dim,
            num_attention_heads=DIMS.num_heads,
            num_key_value_heads=2,
            head_dim=DIMS.head_dim,
            rms_norm_eps=DIMS.norm_eps,
            attn_implementation="eager",
        ),
        layer_idx=0,
    )
    draw = torch.Generator().manual_seed(0)
    for weight in (w for w in ours.parameters() if w.dim() == 2):
        torch.nn.init.normal_(weight, std=0.3, generator=draw)
    with torch.no_grad():
        # One projection gives the query and the gates of a head, one after the other.
        both = [w.weight.unflatten(0, (DIMS.num_heads, -1)) for w in (ours.q_proj, ours.gate_proj)]
        theirs.q_proj.weight.copy_(torch.cat(both, dim=1).flatten(0, 1))
        for name in ("k_proj", "v_proj", "o_proj"):
            getattr(theirs, name).weight.copy_(getattr(ours, name).weight)
    x_BTD = torch.randn(2, 7, DIMS.hidden_dim, generator=draw)
    cos, sin = RotaryTable(rope_dim=6, max_seq_len=7, theta=1e4)(7)
    # Our table has the signs of the rotation in its sines.
    theirs_rope = cos[None], torch.cat((-sin[:, :3], sin[:, 3:]), dim=-1)[None]
    later = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected, _ = theirs(x_BTD, position_embeddings=theirs_rope, attention_mask=later)
    torch.testing.assert_close(ours(x_BTD, (cos, sin)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [gqa_config(gated=True), mlha_config(gated=True)])
def test_gates_of_one_half_halve_and_those_of_a_head_are_its_own(config):
    made, plain = config.build(DIMS).eval(), type(config)(**{**vars(config), "gated": False})
    other = plain.build(DIMS).eval()
    with torch.no_grad():
        made.gate_proj.weight.zero_()
    other.load_state_dict({k: v for k, v in made.state_dict().items() if "gate_proj" not in k})
    rope = RotaryTable(rope_dim=config.rope_dim, max_seq_len=7, theta=1e4)(7)
    x_BTD = torch.randn(2, 7, DIMS.hidden_dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(x_BTD, rope), other(x_BTD, rope) / 2)
    with torch.no_grad():
        # Gates of the second head close at every token whose first entry is large.
        made.gate_proj.weight[10:20, 0] = -1e4
        made.o_proj.weight.copy_(torch.eye(40)[:24])
        other.o_proj.weight.copy_(torch.eye(40)[:24])
    x_BTD[..., 0] = 1.0
    found, ungated = made(x_BTD, rope), other(x_BTD, rope)
    assert found[..., 10:20].abs().max() == 0
    torch.testing.assert_close(found[..., :10], ungated[..., :10] / 2)
    torch.testing.assert_close(found[..., 20:], ungated[..., 20:] / 2)


@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_it_acts_from_the_first_step_and_counts_its_parameters(attention, tiny):
    plain, treated = runs(tiny, "gated_attention", f"attention={attention}")
    assert first_difference(plain, treated) == 1
    more = record(treated)["params_total"] - record(plain)["params_total"]
    assert more == 24 * 24  # hidden_dim * num_heads * head_dim, in one layer
    means = figure(treated, "stability/gated_attention_mean")
    assert means[1] == pytest.approx(0.5, abs=0.02)
    assert means[22] != means[1]
    assert figure(plain, "stability/gated_attention_mean") == {}


@pytest.mark.parametrize("kind", [gqa_config, mlha_config])
def test_without_it_nothing_is_there_and_other_weights_start_alike(kind):
    plain, gated = (transformer(attention=kind(gated=on)) for on in (False, True))
    assert plain.blocks()[0].attention.gate_proj is None
    ours, theirs = plain.state_dict(), gated.state_dict()
    assert {n for n in theirs if n not in ours} == {
        f"layers.{number}.attention.gate_proj.weight" for number in (0, 1)
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "gated" not in compose("train", []).plain()["attention"]
    assert compose("train", ["stability=gated_attention"]).plain()["attention"]["gated"] is True


def test_its_operations_are_counted():
    sizes = [
        measure(
            model=model_config(),
            attention=gqa_config(gated=gated),
            ffn=moe_config(),
            vocab_size=29,
            seq_len=16,
        )
        for gated in (False, True)
    ]
    added = 2 * DIMS.hidden_dim * DIMS.num_heads * DIMS.head_dim
    assert sizes[1].params_total - sizes[0].params_total == added
    assert sizes[1].forward_flops_per_token - sizes[0].forward_flops_per_token == 2 * added
    assert sizes[1].params_by_part["attention"] - sizes[0].params_by_part["attention"] == added


def fitted(*others, **changes):
    (stats,) = GatedAttentionConfig().callbacks(FACTS)
    model = transformer(attention=gqa_config(gated=True), max_seq_len=8)
    kept = []
    for block in model.blocks():
        gate = block.attention.gate_proj

        def keep(module, args, output):
            kept.append(torch.sigmoid(args[1] @ module.weight.T).mean().item())

        gate.register_forward_hook(keep)
    run = Harness(recipe=recipe_config(**changes), callbacks=[stats, *others], model=model).fit()
    return run, kept


def test_its_mean_is_that_of_all_micro_batches_and_layers_of_a_step():
    run, kept = fitted(accumulate=3)
    for step in range(1, 7):
        mean = sum(kept[6 * step - 6 : 6 * step]) / 6
        found = run.recorder.lines[step]["stability/gated_attention_mean"]
        assert found == pytest.approx(mean, rel=1e-5)


def test_a_step_with_nan_leaves_no_trace_in_the_next():
    run, _ = fitted(Poison({2}, what="loss", at="layers.0.attention_norm.weight"))
    assert run.recorder.lines[2]["guard/skipped"] == 1
    means = [run.recorder.lines[n]["stability/gated_attention_mean"] for n in (1, 3, 4, 5, 6)]
    assert all(0 < mean < 1 for mean in means)
    assert all(w.isfinite().all() for w in run.states[-1]["weights"].values())


def test_a_saved_model_is_loaded_with_all_that_remedies_put_into_it(tiny):
    options = "gated_attention,softcap_attention,softcap_head,softcap_router,swiglu_clamp"
    folder = train([*tiny, "recipe.max_steps=2"], f"stability=[{options}]")
    model = load_trained(folder, weights="raw", field="run").model
    (block,) = model.blocks()
    assert block.attention.gate_proj.weight.shape == (24, 24)
    caps = block.attention.softcap.cap, model.softcap.cap, block.ffn.router.softcap.cap
    assert caps == (50.0, 30.0, 30.0)
    assert block.ffn.experts.clamp.limit == block.ffn.shared.clamp.limit == 10.0


def test_an_external_model_and_weights_without_a_gate_are_refused(tiny, capsys):
    external = ["model=external", "model.target=src.examples.mlp:build"]
    with pytest.raises(InputError, match=r"needs attention.gated, which attention=external lacks"):
        compose("train", [*external, "stability=gated_attention"])
    assert main([*tiny, *PACE, "recipe.max_steps=2", "study=saved"]) == 0
    (folder,) = Path("runs/saved").glob("*/seed-0")
    pace = [a for a in tiny if not a.startswith(("model.", "ffn.", "attention."))]
    capsys.readouterr()
    assert main([*pace, f"init={folder}", "stability=gated_attention", "study=new"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "gate_proj.weight is missing" in line
