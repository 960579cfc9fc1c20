"""`python -m src.convert` as a user types it, on a model of ours."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoint.trained_model import load_trained
from src.config.hydra_compose import compose_plain
from src.conversion.convert_model import convert as convert_command
from src.convert import main
from src.data.tokenizer import CharTokenizer
from src.generate import main as generate
from tests.conftest import TINY
from tests.runs import train

GQA = ("attention=gqa", "ffn=mlp", "attention.num_kv_heads=3", "attention.rope_dim=8")
LATENT_STEPS = ["partial rope", "shared rope keys", "kv latent", "query latent"]


def trained_run(factory, shared_cache, name, *more):
    patch = pytest.MonkeyPatch()
    base = factory.mktemp(name)
    patch.chdir(base)
    # All of the plays, so that every character of theirs is known.
    arguments = [a for a in TINY if not a.startswith(("ffn.", "attention.", "data."))]
    folder = train([*arguments, *GQA, f"paths.cache={shared_cache}", "stability=ema", *more])
    patch.undo()
    return base / folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache):
    """A trained gqa + mlp of characters, with averaged weights."""
    return trained_run(tmp_path_factory, shared_cache, "source")


def convert(source, out, *more):
    assert main([f"source={source}", f"out={out}", *more]) == 0
    return json.loads((out / "conversion.json").read_text())


def model(place, weights="raw"):
    return load_trained(place, weights=weights, field="run").model


def logits(place, weights="raw"):
    tokens = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(place, weights)(tokens)


@pytest.mark.parametrize(
    "changes",
    [
        ["attention=mlha"],
        ["ffn=moe", "num_routed=6", "inner_dim=16"],
        ["attention=mlha", "ffn=moe", "num_shared=2"],
        ["attention=mlha", "calibration=null"],
        ["attention=null", "ffn=null"],
    ],
    ids=["attention", "ffn", "both", "unfitted", "neither"],
)
def test_the_logits_are_the_sources_where_nothing_is_given_up(changes, run, tmp_path):
    convert(run, tmp_path / "out", *changes)
    # The bound that was set; the measured difference is below 1e-5.
    torch.testing.assert_close(logits(tmp_path / "out"), logits(run), rtol=0, atol=1e-4)


def test_averaged_weights_are_converted_where_they_are_asked_for(run, tmp_path):
    convert(run, tmp_path / "out", "weights=ema", "attention=mlha")
    averaged, raw = logits(run, "ema"), logits(run)
    torch.testing.assert_close(logits(tmp_path / "out"), averaged, rtol=0, atol=1e-4)
    assert (averaged - raw).abs().max() > 1e-2


def test_it_reports_what_each_step_lost_in_each_layer(run, tmp_path, capsys):
    given_up = ["rope_dim=4", "num_rope_keys=1", "kv_latent_dim=6", "q_latent_dim=8"]
    report = convert(run, tmp_path / "out", "attention=mlha", "ffn=moe", *given_up)
    (lost,) = report["layers"]
    assert list(lost) == [*(f"attention: {step}" for step in LATENT_STEPS), "ffn: experts"]
    attention = [lost[f"attention: {step}"] for step in LATENT_STEPS]
    assert all(one < other for one, other in pairwise(attention))
    assert lost["ffn: experts"] < 1e-6
    assert report["loss"]["converted"] != report["loss"]["source"]
    assert report["cache_bytes_per_token"] == {"source": 4 * 2 * 24, "converted": 4 * (6 + 4)}
    text = capsys.readouterr().out
    assert "layer" in text and "KV cache in bytes per token: 192 before, 40 after" in text


def test_the_figures_are_of_text_that_the_fit_has_not_seen(run, tmp_path):
    """A layer's loss is what its module makes of the held-out text."""
    fitted, even = (
        convert(run, tmp_path / name, "attention=mlha", "kv_latent_dim=12", *more)
        for name, more in (("fitted", []), ("even", ["calibration_tokens=16"]))
    )
    # Of one layer the narrow one, by a fit to 8192 tokens and to 16.
    key = "attention: kv latent"
    assert fitted["layers"][0][key] < even["layers"][0][key]


def test_what_it_writes_is_generated_from_and_converted_on(run, tmp_path, capsys):
    convert(run, tmp_path / "one", "attention=mlha")
    convert(tmp_path / "one", tmp_path / "two", "ffn=moe")
    convert(tmp_path / "one" / "checkpoints" / "last.ckpt", tmp_path / "three", "ffn=moe")
    capsys.readouterr()
    texts = []
    for place in (run, tmp_path / "one", tmp_path / "two", tmp_path / "three"):
        assert generate([f"run={place}", "prompt=The", "temperature=0", "max_new_tokens=8"]) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert model(tmp_path / "two").layers[0].ffn.experts.num_experts == 7


def test_the_same_command_again_does_nothing_and_another_refuses(run, tmp_path, capsys):
    convert(run, tmp_path / "out", "attention=mlha")
    before = (tmp_path / "out" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    convert(run, tmp_path / "out", "attention=mlha")
    assert "already holds this conversion" in capsys.readouterr().out
    command = [f"source={run}", f"out={tmp_path / 'out'}"]
    assert main([*command, "attention=mlha", "kv_latent_dim=4"]) == 2
    assert "(kv_latent_dim was None, now 4)" in capsys.readouterr().err
    assert main([*command, "attention=mlha", "weights=ema"]) == 2
    assert "(weights was raw, now ema)" in capsys.readouterr().err
    assert (tmp_path / "out" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_other_weights_are_another_conversion(run, tmp_path, capsys):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save(content, tmp_path / "source.ckpt")
    convert(tmp_path / "source.ckpt", tmp_path / "out", "ffn=moe")
    content["state_dict"]["model.final_norm.weight"][0] += 1
    torch.save(content, tmp_path / "source.ckpt")
    assert main([f"source={tmp_path / 'source.ckpt'}", f"out={tmp_path / 'out'}", "ffn=moe"]) == 2
    assert "(source_digest was " in capsys.readouterr().err


def test_another_text_or_another_base_is_another_conversion(run, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("To be, or not to be: " * 500)
    given = ["attention=mlha", "kv_latent_dim=4", f"calibration={text}"]
    convert(run, tmp_path / "out", *given)
    text.write_text("That is the question, " * 500)
    assert main([f"source={run}", f"out={tmp_path / 'out'}", *given]) == 2
    assert "(calibration_digest was " in capsys.readouterr().err
    convert(run, tmp_path / "hf", "to=hf")
    convert(tmp_path / "hf", tmp_path / "back")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 99.0
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert main([f"source={tmp_path / 'hf'}", f"out={tmp_path / 'back'}"]) == 2
    assert "(source_digest was " in capsys.readouterr().err


def test_an_interrupted_conversion_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    fields = compose_plain("convert", ["source=x", "out=x"])
    (tmp_path / "out.part").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("src.conversion.write.yaml.safe_dump", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert_command(fields | {"source": str(run), "out": str(tmp_path / "out")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.part"]
    convert(run, tmp_path / "out")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "out.part"]


def test_pairs_that_are_kept_are_kept_in_the_whole_model(run, tmp_path):
    """Queries and keys of nothing but each head's two fastest pairs: half a rotation is exact."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = torch.zeros(8, dtype=torch.bool)
    kept[[0, 1, 4, 5]] = True
    for name in ("q_proj", "k_proj"):
        weight = content["state_dict"][f"model.layers.0.attention.{name}.weight"]
        weight.copy_((weight.unflatten(0, (3, 8)) * 50 * kept[None, :, None]).flatten(0, 1))
    torch.save(content, tmp_path / "source.ckpt")
    report = convert(tmp_path / "source.ckpt", tmp_path / "out", "attention=mlha", "rope_dim=4")
    before = logits(tmp_path / "source.ckpt")
    assert (before - logits(run)).abs().max() > 1e-2
    torch.testing.assert_close(logits(tmp_path / "out"), before, rtol=0, atol=1e-4)
    assert report["layers"][0]["attention: partial rope"] < 1e-5
    slow = ["attention=mlha", "rope_dim=4", "rope_stride=2"]
    report = convert(tmp_path / "source.ckpt", tmp_path / "slow", *slow)
    assert report["layers"][0]["attention: partial rope"] > 1e-2
    difference = report["loss"]["max_logit_difference"]
    assert 0 < difference < 100 and report["loss"]["converted"] != report["loss"]["source"]


def test_layers_that_do_nothing_lose_nothing(run, tmp_path):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["model.layers.0.attention.o_proj.weight"].zero_()
    torch.save(content, tmp_path / "source.ckpt")
    given = ["attention=mlha", "kv_latent_dim=4"]
    report = convert(tmp_path / "source.ckpt", tmp_path / "out", *given)
    assert report["layers"][0]["attention: kv latent"] == 0.0


@pytest.mark.parametrize("name", ["a=b", "1e3", "null ", "a'b", "{a}", "u,v", "\u00fc", "a b"])
def test_a_place_is_taken_as_it_is_typed(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to(run)
    convert(name, Path("out"), "calibration=null")


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(run, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 1 vs 2")

    monkeypatch.setattr("torch.save", full)
    assert main([f"source={run}", f"out={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out={tmp_path / 'out'}: cannot be written ([enforce fail" in line
    assert list(tmp_path.iterdir()) == []


def test_half_a_conversion_is_none(run, tmp_path, capsys):
    convert(run, tmp_path / "out")
    (tmp_path / "out" / "checkpoints" / "last.ckpt").unlink()
    assert main([f"source={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "does not hold a complete conversion" in capsys.readouterr().err


def test_a_link_to_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    convert(run, tmp_path / "link")
    convert(run, tmp_path / "dangling")
    assert (tmp_path / "real" / "config.yaml").is_file()
    assert (tmp_path / "later" / "config.yaml").is_file()


def test_the_same_conversion_is_the_same_bytes(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    for name, source in (("one", run), ("two", tmp_path / "link")):
        convert(source, tmp_path / name, "attention=mlha", "ffn=moe", "kv_latent_dim=6")
    one, two = ((tmp_path / n / "checkpoints" / "last.ckpt").read_bytes() for n in ("one", "two"))
    assert one == two
    convert(run, tmp_path / "three", "attention=mlha", "ffn=moe", "kv_latent_dim=6", "seed=1")
    assert (tmp_path / "three" / "checkpoints" / "last.ckpt").read_bytes() != one


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_every_tokenizer_goes_to_transformers_and_comes_back(
    tokenizer, tmp_path_factory, shared_cache, tmp_path
):
    more = [f"tokenizer={tokenizer}"]
    more += ["tokenizer.vocab_size=300"] if tokenizer == "bpe" else []
    run = trained_run(tmp_path_factory, shared_cache, f"for-{tokenizer}", *more)
    convert(run, tmp_path / "hf", "to=hf")
    text = "The king said:\n  What, ho!"
    ours = load_trained(run, weights="raw", field="run")
    library = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = library(text).input_ids
    assert ids == ours.tokenizer.encode(text).tolist()
    assert library.decode(ids) == text
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = torch.tensor([ids[:16]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours.model(tokens), rtol=0, atol=1e-4)
    convert(tmp_path / "hf", tmp_path / "back")
    back = load_trained(tmp_path / "back", weights="raw", field="run")
    assert back.tokenizer.encode(text).tolist() == ids
    assert isinstance(back.tokenizer, CharTokenizer) == (tokenizer == "char")
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], weight)


BAD = {
    "nowhere": (["source=nowhere"], "source=nowhere: no such folder or file"),
    "to": (["to=onnx"], "to=onnx: must be one of checkpoint, hf"),
    "weights": (["weights=best"], "weights=best: must be one of raw, ema, none"),
    "attention": (["attention=mha"], "attention=mha: must be one of null, gqa, mlha"),
    "ffn": (["ffn=dense"], "ffn=dense: must be one of null, mlp, moe"),
    "not an integer": (["attention=mlha", "rope_dim=4.5"], "rope_dim=4.5: must be an integer"),
    "not for it": (["kv_latent_dim=8"], "kv_latent_dim=8: needs attention=mlha"),
    "nor this": (["top_k=2"], "top_k=2: needs ffn=moe"),
    "odd": (["attention=mlha", "rope_dim=3"], "rope_dim=3: must be positive and even"),
    "zero": (["attention=mlha", "kv_latent_dim=0"], "kv_latent_dim=0: must be at least 1"),
    "wide": (["attention=mlha", "kv_latent_dim=99"], "kv_latent_dim=99: must be at most"),
    "all rotate": (["attention=mlha", "rope_dim=10"], "rope_dim=10: must be at most"),
    "keys": (["attention=mlha", "num_rope_keys=2"], "num_rope_keys=2: must divide"),
    "parts": (
        ["ffn=moe", "inner_dim=12"],
        "inner_dim=12: must divide the dense network's inner_dim=32",
    ),
    "top_k": (["ffn=moe", "top_k=9"], "top_k=9: must be from 1 to ffn.num_routed=7"),
    "seed": (["seed=-1"], "seed=-1: must be at least 0"),
    "calibration": (["ffn=moe", "calibration=nowhere"], "calibration=nowhere: cannot be read"),
    "tokens": (["calibration_tokens=0"], "calibration_tokens=0: must be at least 1"),
    "a text for nothing": (["calibration=x"], "calibration=x: has no effect"),
    "a seed for nothing": (["seed=1"], "seed=1: has no effect without new routers"),
    "no llama": (["to=hf", "attention=mlha"], "to=hf: can write only Llama models"),
    "no weights": (["to=hf", "weights=none"], "weights=none: needs to=checkpoint"),
    "no source": (["source=null"], "source=null: must be a path"),
    "no out": (["out=null"], "out=null: must be a path"),
    "two outs": (["out=[a,b]"], "out=['a', 'b']: must be a path"),
    "here": (["out=."], "out=/"),
    "a long name": (["out=" + "x" * 300], "cannot be"),
    "signed": (["+attention=mlha"], "+attention=mlha: type fields as field=value"),
    "threads": (["threads=0"], "threads=0: must be at least 1"),
    "unknown": (["kv_latent=8"], "kv_latent: unknown field; did you mean kv_latent_dim?"),
    "section": (["attention.kv_latent_dim=8"], "attention.kv_latent_dim: unknown field"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, run, tmp_path, capsys):
    assert main([f"source={run}", f"out={tmp_path / 'out'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_does_not_serve_is_one_line(run, tmp_path, capsys):
    for content, message in (
        (b"too short", "shorter than a window of 16 tokens"),
        ("Die K\u00f6nigin".encode() * 500, "character '\u00f6'"),
        (b"\xff" * 500, "cannot be read"),
    ):
        (tmp_path / "text").write_bytes(content)
        given = [f"source={run}", f"out={tmp_path / 'out'}", "attention=mlha"]
        assert main([*given, f"calibration={tmp_path / 'text'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"calibration={tmp_path / 'text'}: " in line and message in line


def test_a_folder_that_holds_something_else_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert main([f"source={run}", f"out={tmp_path / 'out'}"]) == 2
    assert "exists and does not hold a complete conversion" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    assert main([f"source={run}", f"out={tmp_path / 'out' / 'thesis.txt'}"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_what_has_no_other_way_is_said(run, tmp_path, capsys):
    convert(run, tmp_path / "both", "attention=mlha", "ffn=moe")
    for given, message in (
        ("attention=gqa", "attention=gqa: the source has attention=mlha; must be mlha"),
        ("ffn=mlp", "ffn=mlp: the source has ffn=moe; must be moe"),
        ("to=hf", "to=hf: can write only Llama models, which have attention=gqa and ffn=mlp"),
        ("weights=ema", "weights=ema: "),
    ):
        assert main([f"source={tmp_path / 'both'}", f"out={tmp_path / 'out'}", given]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_sizes_alone_are_no_model(run, tmp_path, capsys):
    convert(run, tmp_path / "sizes", "attention=mlha", "weights=none")
    assert generate([f"run={tmp_path / 'sizes'}", "prompt=The"]) == 2
    assert "holds a model's sizes but no weights" in capsys.readouterr().err
