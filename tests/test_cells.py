"""Every cell of the groups composes and trains."""

import itertools

import pytest

from src.common.override_grammar import quote_free_text
from src.config.compose import compose
from src.config.hydra_compose import CONF
from tests.conftest import TINY
from tests.runs import metrics, record, train


def options(group: str) -> list[str]:
    """Those of our own; external models have tests of their own."""
    names = {file.stem for file in (CONF / group).glob("*.yaml")}
    return sorted(names - {"external"})


CELLS = list(itertools.product(options("attention"), options("ffn")))


@pytest.mark.parametrize(("attention", "ffn"), CELLS)
def test_every_cell_trains_and_learns(attention, ffn, tiny):
    # At the rate of the write-up's 11,000 steps: at that of 30 its router would fail, as it must.
    rate = "model.sizes.writeup_bias_rate=0.1"
    folder = train(tiny, f"attention={attention}", f"ffn={ffn}", "recipe.max_steps=30", rate)
    made = record(folder)
    assert made["outcome"] == "clean"
    assert made["variant"]["attention"] == attention
    assert metrics(folder)[-1]["train/loss"] < metrics(folder)[0]["train/loss"] - 0.3


PRESETS, SIZES = options("preset"), options("model")
# Each size goes with every cell, and each preset with every ffn.
ROTATED = [
    (preset, model, *CELLS[(i + j * 3) % len(CELLS)])
    for i, preset in enumerate(PRESETS)
    for j, model in enumerate(SIZES)
]
ALL = [
    pytest.param(preset, model, *cell, marks=pytest.mark.slow)
    for preset, model, cell in itertools.product(PRESETS, SIZES, CELLS)
    if (preset, model, *cell) not in ROTATED
]


@pytest.mark.parametrize(("preset", "model", "attention", "ffn"), [*ROTATED, *ALL])
def test_every_preset_composes_with_every_size(preset, model, attention, ffn):
    compose("train", [f"preset={preset}", f"model={model}", f"attention={attention}", f"ffn={ffn}"])


def test_each_size_has_seen_every_cell_and_each_preset_every_part():
    for model in SIZES:
        assert {case[2:] for case in ROTATED if case[1] == model} == set(CELLS)
    for preset in PRESETS:
        own = [case for case in ROTATED if case[0] == preset]
        assert {case[2] for case in own} == set(options("attention"))
        assert {case[3] for case in own} == set(options("ffn"))


@pytest.mark.parametrize("group", ["data", "tokenizer", "trainer", "tracking"])
def test_every_other_option_composes(group):
    needs = {"text": ["data.path=x"], "tokens": ["data.path=x", "tokenizer.vocab_size=9"]}
    needs["ids"] = ["tokenizer.vocab_size=9"]
    needs["checkpoint"] = ["tokenizer.path=x"]
    for option in options(group):
        if option != "gpu":
            compose("train", [f"{group}={option}", *needs.get(option, [])])


def test_what_is_typed_wins_over_the_preset():
    config = compose("train", ["preset=smoke", "recipe.max_steps=7", "model=small"])
    assert config.recipe.max_steps == 7
    assert config.model.hidden_dim == 256


def test_variant_names():
    def name(*arguments: str) -> str:
        return compose("train", [quote_free_text(a) for a in arguments]).variant_name

    assert name() == "mlha+moe+none"
    assert name("stability=[ema,clip03]", "seed=3", "study=x", "tracking=local") == (
        "mlha+moe+clip03-ema"
    )
    assert name("recipe.learning_rate=0.003") == "mlha+moe+none@learning_rate-0.003"
    assert name("seed=1", "recipe.eps=1e-7", "recipe.accumulate=2") == (
        name("recipe.accumulate=2", "recipe.eps=1e-7")
    )
    assert name("recipe.checkpoint_every=7") == "mlha+moe+none"
    assert name("attention=gqa", "model=small") == "gqa+moe+none@model-small"
    assert name("recipe.clip_norm=null").endswith("@clip_norm-null")
    odd = name("data=text", "data.path=my file=1,2.txt")
    assert not set(odd) & set("= ~,")
    assert odd != name("data=text", "data.path=my file=1;2.txt")
    long = name(*[a for a in TINY if a != "tracking=local"], "guard.max_consecutive=3")
    assert len(long) <= 207


def test_the_hash_covers_what_changes_numbers_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def hashed(*arguments: str) -> str:
        return compose("train", arguments).config_hash()

    base = hashed()
    for same in (
        "paths.runs=x",
        "tracking=local",
        "study=y",
        "resume=never",
        "rerun=true",
        "recipe.checkpoint_every=7",
    ):
        assert hashed(same) == base, same
    for other in (
        "seed=1",
        "repeat=1",
        "recipe.precision=32-true",
        "trainer.threads=2",
        "stability=ema",
        "ffn.router.norm_eps=0",
        "attention=gqa",
        "data.max_chars=1000",
        "tokenizer=byte",
        "guard.check=[loss]",
    ):
        assert hashed(other) != base, other
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("one")
    one, two = (hashed("data=text", f"data.path={name}.txt") for name in "ab")
    assert one == two
    (tmp_path / "b.txt").write_text("two")
    assert hashed("data=text", "data.path=b.txt") != one


def test_a_preset_is_not_part_of_the_hash_but_what_it_sets_is():
    smoke = compose("train", ["preset=smoke"])
    typed = [f"recipe.{f}={getattr(smoke.recipe, f)}" for f in ("max_steps", "batch_size")]
    typed += [f"recipe.{f}={getattr(smoke.recipe, f)}" for f in ("seq_len", "learning_rate")]
    same = compose("train", [*typed, f"recipe.val_windows={smoke.recipe.val_windows}"])
    assert same.config_hash() == smoke.config_hash()
