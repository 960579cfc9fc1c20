"""Training that begins from a saved model."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from src.checkpoint.trained_model import load_trained
from src.common.errors import InputError
from src.common.override_grammar import quote_free_text
from src.config.compose import compose
from src.config.hydra_compose import CONF
from src.config.variant_name import without_common_folders
from src.convert import main as convert
from src.generate import main as generate
from src.report import main as report
from src.train import main
from src.training.stop_on_signal import Interrupt
from tests.conftest import PACE, TINY
from tests.runs import (
    assert_same_run,
    last_checkpoint,
    made,
    metrics,
    record,
    stop_after,
    train,
    weights,
)

SOURCE = ("attention=gqa", "ffn=mlp", "attention.num_kv_heads=3")


@pytest.fixture(scope="module")
def base(tmp_path_factory, shared_cache):
    """A folder with a trained run (`run`), and conversions of it."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("initial")
    patch.chdir(folder)
    tiny = [a for a in TINY if not a.startswith(("ffn.", "data."))]
    train([*tiny, *SOURCE, f"paths.cache={shared_cache}"]).rename("run")
    narrow = ["attention=mlha", "rope_dim=2", "kv_latent_dim=8", "ffn=moe", "calibration=null"]
    for name, fields in {
        "exact": ["attention=mlha"],
        "narrow": narrow,
        "sizes": [*narrow, "weights=none"],
    }.items():
        assert convert(["source=run", f"out={name}", *fields]) == 0
    patch.undo()
    return folder


@pytest.fixture
def here(base, tmp_path, monkeypatch, shared_cache):
    """Arguments of a run in a folder of its own, where the saved models are at hand."""
    for name in ("run", "exact", "narrow", "sizes"):
        (tmp_path / name).symlink_to(base / name)
    monkeypatch.chdir(tmp_path)
    return [*PACE, f"paths.cache={shared_cache}"]


def first_line(folder):
    line = metrics(folder)[0]
    assert line["step"] == 0
    return line


def test_it_begins_with_the_saved_weights_sizes_and_tokenizer(here):
    still = train(here, "init=narrow", "recipe.learning_rate=0")
    saved = load_trained(Path("narrow"), weights="raw", field="run")
    assert weights(still).keys() == {f"model.{name}" for name in saved.model.state_dict()}
    for name, weight in saved.model.state_dict().items():
        if "bias_E" not in name:  # which balances the load whatever the rate
            assert torch.equal(weights(still)[f"model.{name}"], weight), name
    config = yaml.safe_load((still / "config.yaml").read_text())
    assert config["attention"]["kv_latent_dim"] == 8
    assert config["choices"]["attention"] == "mlha" and config["choices"]["ffn"] == "moe"
    assert config["model"]["num_layers"] == 1
    assert last_checkpoint(still)["tokenizer"] == last_checkpoint(Path("run"))["tokenizer"]
    found = record(still)
    assert found["init"] == {"path": "narrow", "digest": config["init"]["digest"]}
    assert found["variant_name"].startswith("mlha+moe+none@preset-smoke@init-narrow@")
    assert found["cache_bytes_per_token"] == 4 * (8 + 3 * 2)


def test_the_loss_before_training_is_logged_and_is_neither_best_nor_final(here):
    still = train(here, "init=run", "recipe.learning_rate=0")
    assert first_line(still)["val/loss"] == metrics(still)[-1]["val/loss"]
    assert record(still)["best"]["step"] == 4
    exact = train(here, "init=exact")
    # Logits differ by roundings, and mlha's products round in bfloat16.
    assert math.isclose(first_line(exact)["val/loss"], first_line(still)["val/loss"], rel_tol=1e-3)
    assert metrics(exact)[-1]["val/loss"] < first_line(exact)["val/loss"]
    assert (
        "final" in record(exact)
        and record(exact)["final"]["val/loss"] == (metrics(exact)[-1]["val/loss"])
    )


def test_without_init_nothing_is_validated_before_training_but_where_it_is_asked(tiny):
    plain = made(tiny)
    assert metrics(plain)[0]["step"] == 1
    assert "init" not in record(plain)["variant_name"]
    asked = train(tiny, "validate_at=[0]", "study=asked")
    assert first_line(asked).keys() >= {"val/loss", "val/nonfinite_frac"}


# A saved model without gates lacks weights that would have to be trained: it is refused.
OPTIONS = {f.stem for f in (CONF / "stability").glob("*.yaml")} - {"none", "gated_attention"}
# Those that go together in one run; each in one of its own in `make test-all`.
TOGETHER = [
    sorted(OPTIONS - {"adagc", "clip03", "clip05", "early_stop", "qk_norm", "router_eps20"}),
    ["clip03", "early_stop", "qk_norm", "router_eps20"],
    ["clip05"],
    ["adagc"],
]
ALONE = [
    pytest.param([option], marks=pytest.mark.slow)
    for option in sorted(OPTIONS)
    if [option] not in TOGETHER
]


@pytest.mark.parametrize("options", [*TOGETHER, *ALONE], ids="+".join)
def test_every_option_goes_with_it(options, here):
    pace = ("recipe.num_validations=1", "recipe.max_steps=6")
    folder = train(here, "init=narrow", f"stability=[{','.join(options)}]", *pace)
    assert record(folder)["outcome"] == "clean"
    assert first_line(folder)["val/loss"] > 0


def test_options_that_add_norms_say_so(here):
    folder = train(here, "init=narrow", "stability=[qk_norm,latent_norm,ema,clip03]")
    assert record(folder)["outcome"] == "clean"
    (note,) = [note for note in record(folder)["notes"] if "norms" in note]
    assert note.startswith("init=narrow has no layers.0.attention.") and "start at 1" in note
    assert first_line(folder)["val/loss"] > 0


def test_any_router_can_be_put_on_saved_experts(here):
    correct, published = (
        train(here, "init=narrow", f"ffn={ffn}") for ffn in ("moe", "moe_writeup")
    )
    router = yaml.safe_load((published / "config.yaml").read_text())["ffn"]["router"]
    assert router["bias_use"] == "multiply"
    # Experts that are all alike: the router does not matter yet.
    assert math.isclose(
        first_line(correct)["val/loss"], first_line(published)["val/loss"], rel_tol=1e-3
    )
    assert metrics(correct)[-1]["val/loss"] != metrics(published)[-1]["val/loss"]


def test_sizes_without_weights_are_drawn_from_the_seed(here):
    one, two = (train(here, "init=sizes", f"seed={seed}") for seed in (0, 1))
    for folder in (one, two):
        assert abs(first_line(folder)["val/loss"] - math.log(65)) < 0.2
    assert first_line(one)["val/loss"] != first_line(two)["val/loss"]
    notes = record(one)["notes"]
    assert notes == ["init=sizes holds sizes but no weights; they are drawn from the seed"]
    assert weights(one).keys() == weights(made(here, "init=narrow", "study=whole")).keys()


def test_interrupted_and_resumed_is_bitwise_uninterrupted(here, monkeypatch):
    whole = train(here, "init=narrow", "stability=ema", "study=whole")
    for step in (2, 7):  # before the first checkpoint of its own, and after
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            assert main([*here, "init=narrow", "stability=ema", "study=cut"]) == 143
    assert main([*here, "init=narrow", "stability=ema", "study=cut"]) == 0
    (resumed,) = (file.parent for file in Path("runs/cut").rglob("record.json"))
    assert_same_run(resumed, whole)
    assert [line["step"] for line in metrics(resumed)].count(0) == 1


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(here, monkeypatch):
    def die(self, trainer, pl_module, done):
        raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Interrupt, "on_step_end", die)
        assert main([*here, "init=narrow"]) == 1
    (folder,) = (file.parent for file in Path("runs").rglob("record.json"))
    assert [line["step"] for line in metrics(folder)][:1] == [0]
    assert main([*here, "init=narrow"]) == 0
    assert_same_run(folder, made(here, "init=narrow", "study=whole"))


def test_a_fork_inherits_it(here):
    base = train(here, "init=narrow", "study=base", "save_at=[4]")
    whole = train(here, "init=narrow", "stability=warmdown", "study=whole")
    forked = train(
        [f"paths.cache={a.partition('=')[2]}" for a in here if a.startswith("paths.cache")],
        f"fork={base}@4",
        "stability=warmdown",
        "study=forked",
        "tracking=local",
    )
    # What an option logs of itself starts with it, and a fork starts there.
    for name in ("train/loss", "val/loss", "lr", "grad/norm"):
        one, two = ([line.get(name) for line in metrics(folder)] for folder in (forked, whole))
        assert one == two, name
    assert weights(forked).keys() == weights(whole).keys()
    assert all(torch.equal(weights(forked)[name], w) for name, w in weights(whole).items())
    assert record(forked)["init"] == record(whole)["init"]
    assert main([*here, f"fork={base}@4", "init=exact", "ffn=mlp", "study=bad"]) == 2


def test_another_saved_model_is_another_run(here, base, capsys):
    folder = made(here, "init=narrow")
    hashes = {compose("train", [*here, f"init={n}"]).config_hash() for n in ("narrow", "exact")}
    assert len(hashes) == 2
    # The same content elsewhere is the same run.
    Path("copy").symlink_to(base / "narrow")
    moved = compose("train", [*here, "init=copy"])
    assert moved.config_hash() == record(folder)["config_hash"]
    Path("narrow").unlink()
    Path("narrow").symlink_to(base / "sizes")
    assert main([*here, "init=narrow"]) == 2
    assert "(init.digest was " in capsys.readouterr().err


@pytest.mark.slow
def test_a_sweep_over_saved_models_compares_them_and_reports_before_and_after(here, capsys):
    sweep = [*here, "study=saved", "init=sizes, narrow,exact", "seed=0,1", "recipe.max_steps=8"]
    assert main(["--multirun", *sweep, "watch.routers_every=null"]) == 0
    names = sorted(p.parent.parent.name for p in Path("runs/saved").glob("*/*/record.json"))
    assert len(names) == 6
    assert report(["study=saved"]) == 0
    text = Path("runs/saved/report/report.md").read_text()
    section = text.split("## Saved models")[1].split("\n## ")[0]
    for name in ("sizes", "narrow", "exact"):
        (line,) = [line for line in section.splitlines() if f"| {name} |" in line]
        cells = [cell.strip() for cell in line.split("|")]
        folders = Path("runs/saved").glob(f"*init-{name}@*/seed-*")
        lines = [metrics(folder) for folder in sorted(folders)]
        assert len(lines) == 2
        before = sum(run[0]["val/loss"] for run in lines) / 2
        after = sum(run[-1]["val/loss"] for run in lines) / 2
        assert cells[5] == f"{before:.3f}" and cells[6].startswith(f"{after:.3f} (")
    assert "differs from its baseline in more than it says" not in text
    assert 'id="starts"' in Path("runs/saved/report/report.html").read_text()


def test_a_report_without_saved_models_has_no_such_section(tiny):
    made(tiny, "study=plain")
    assert report(["study=plain"]) == 0
    assert "Saved models" not in Path("runs/plain/report/report.html").read_text()


def test_what_was_trained_on_writes_text(here, capsys):
    folder = train(here, "init=narrow", "recipe.seq_len=32")
    capsys.readouterr()
    assert generate([f"run={folder}", "prompt=The", "max_new_tokens=5", "format=json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"][0]["tokens"]) == 5


BAD = {
    "nowhere": (["init=nowhere"], "init=nowhere: no such run folder or checkpoint"),
    "no run": (["init=."], "init=.: is not a run folder"),
    "a size": (["init=narrow", "attention.kv_latent_dim=4"], "kv_latent_dim=4: init=narrow has 8"),
    "layers": (["init=narrow", "model.num_layers=2"], "model.num_layers=2: init=narrow has 1"),
    "vocabulary": (["init=narrow", "model.vocab_size=9"], "model.vocab_size=9: init=narrow has"),
    "inner": (["init=run", "model.inner_dim=77"], "model.inner_dim=77: init=run determines this"),
    "tie": (["init=run", "model.tie_embeddings=false"], "init=run determines this; leave it out"),
    "sizes": (["init=run", "model.sizes.top_k=1"], "model.sizes.top_k=1: init=run determines this"),
    "fork": (
        ["fork=narrow@1"],
        "fork=narrow@1: narrow is a converted model, not a run; type init=narrow",
    ),
    "attention": (["init=narrow", "attention=gqa"], "attention=gqa: init=narrow has attention"),
    "ffn": (["init=exact", "ffn=moe"], "ffn=moe: init=exact has ffn=mlp; src.convert converts"),
    "model": (["init=narrow", "model=small"], "model=small: init=narrow determines this"),
    "nothing": (["init="], "init=: is empty"),
    "its path": (
        ["init=narrow", "tokenizer.path=x"],
        "tokenizer.path=x: init=narrow determines this",
    ),
    "tokenizer": (["init=narrow", "tokenizer=bpe"], "tokenizer=bpe: init=narrow determines this"),
    "experts": (["init=narrow", "ffn.num_routed=5"], "ffn.num_routed=5: init=narrow has 7"),
    "resume": (["resume=narrow/checkpoints/last.ckpt"], "is a converted model; init="),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, here, capsys):
    assert main([*here, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("runs").exists()


def test_a_character_that_it_does_not_know_is_named(here, capsys):
    Path("text").write_text("K\u00f6nigin, " * 2000)
    assert main([*here, "init=narrow", "data=text", "data.path=text"]) == 2
    assert "character '\u00f6'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["final_norm", "layers.0.attention_norm", "layers.0.ffn.router"])
def test_weights_that_are_missing_are_named(name, here, base):
    content = torch.load(base / "narrow" / "checkpoints" / "last.ckpt", weights_only=True)
    del content["state_dict"][f"model.{name}.weight"]
    torch.save(content, "broken.ckpt")
    with pytest.raises(InputError, match=f"weights do not fit the model: {name}.weight is missing"):
        compose("train", [*here, "init=broken.ckpt"])


def test_a_file_that_is_no_checkpoint_is_one_line(here, base):
    content = torch.load(base / "narrow" / "checkpoints" / "last.ckpt", weights_only=True)
    for key in ("choices", "kinds", "model", "recipe"):
        config = {name: value for name, value in content["config"].items() if name != key}
        torch.save(content | {"config": config}, "broken.ckpt")
        with pytest.raises(InputError, match=r"init=broken\.ckpt: is not a checkpoint"):
            compose("train", [*here, "init=broken.ckpt"])


def test_a_presets_router_is_the_runs(here):
    chosen = compose("train", ["preset=control", "init=narrow"])
    assert chosen.choices["ffn"] == "moe_writeup_add"
    assert chosen.ffn.router.bias_use == "add" and chosen.ffn.num_routed == 7
    with pytest.raises(InputError, match="init=exact has ffn=mlp"):
        compose("train", ["preset=control", "init=exact"])


def test_a_typed_null_is_nothing(tiny):
    one, two = made(tiny), train(tiny, "init=null", "study=two")
    assert_same_run(one, two)
    assert record(one)["variant_name"] == record(two)["variant_name"]


def test_names_of_models_side_by_side_leave_out_the_folders_above_them():
    base = "mlha+mlp+none"
    several = [f"{base}@init-models+convert+kv24", f"{base}@init-models+convert+kv48@lr-1"]
    assert list(without_common_folders(several).values()) == [
        f"{base}@init-kv24",
        f"{base}@init-kv48@lr-1",
    ]
    nested = [f"{base}@init-a+b-1.5", f"{base}@init-a+b-1.7+c", base]
    assert list(without_common_folders(nested).values()) == [
        f"{base}@init-b-1.5",
        f"{base}@init-b-1.7+c",
        base,
    ]
    alone = [f"{base}@init-models+kv24", base]
    assert list(without_common_folders(alone).values()) == alone


def test_no_two_places_have_one_name(here, base):
    places = ["a/b", "a+b", "b", str(Path("b").absolute())]
    for place in places:
        Path(place).parent.mkdir(exist_ok=True)
        if not Path(place).exists():
            Path(place).symlink_to(base / "narrow")
    names = [compose("train", [*here, quote_free_text(f"init={p}")]).variant_name for p in places]
    assert len(set(names)) == len(places)
    assert compose("train", [*here, "init=./b"]).variant_name == names[2]
