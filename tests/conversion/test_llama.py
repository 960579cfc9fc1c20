"""Models of the Llama type in and out, against transformers, which the command never imports."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.convert import main
from src.generation.decode import continue_prompts
from src.generation.sampling import Sampling
from src.run.trained import load_trained
from tests.conversion.llamas import VOCAB, folder, llama
from tests.runs import ROOT

# The bound of the comparison with transformers; logits are of order 1 to 10.
CLOSE = {"rtol": 0, "atol": 1e-4}
GREEDY = Sampling(temperature=0, top_p=None, top_k=None, repetition_penalty=1.0)


def converted(source, out, *more):
    assert main([f"source={source}", f"out={out}", *more]) == 0
    return out


def ours(place):
    return load_trained(Path(place), weights="raw", field="run")


def tokens(batch=2, time=40):
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4, "head_dim": 6},
        {"rms_norm_eps": 1e-2, "num_key_value_heads": 1},
    ],
    ids=["tied", "untied", "multi-head", "one-kv-head"],
)
def test_logits_are_transformers_both_ways(changes, tmp_path):
    theirs = llama(**changes)
    here = converted(folder(tmp_path / "hf", theirs), tmp_path / "here")
    model = ours(here).model
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(model(tokens()), expected, **CLOSE)
    back = AutoModelForCausalLM.from_pretrained(converted(here, tmp_path / "back", "to=hf"))
    for name, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight), name
    with torch.no_grad():
        torch.testing.assert_close(back(tokens()).logits, expected, rtol=0, atol=0)


def test_a_greedy_text_with_our_cache_is_transformers_token_for_token(tmp_path):
    theirs = llama(eos_token_id=None)
    trained = ours(converted(folder(tmp_path / "hf", theirs), tmp_path / "here"))
    ids = trained.tokenizer.encode("The king said")
    expected = theirs.generate(torch.tensor(ids)[None], max_new_tokens=64, do_sample=False)
    (found,) = continue_prompts(
        trained.model, [ids.tolist()], max_new_tokens=64, sampling=GREEDY, seed=0
    )
    assert len(set(found)) > 10, "a text of one token shows little"
    assert found == expected[0, len(ids) :].tolist()


def test_a_text_ends_at_the_token_that_ends_it_there(tmp_path):
    theirs = llama()
    trained = ours(converted(folder(tmp_path / "hf", theirs), tmp_path / "here"))
    ids = trained.tokenizer.encode("The king said").tolist()
    (free,) = continue_prompts(trained.model, [ids], max_new_tokens=30, sampling=GREEDY, seed=0)
    ends_with = free[12]
    theirs.config.eos_token_id = [ends_with]
    ended = ours(converted(folder(tmp_path / "hf2", theirs), tmp_path / "here2"))
    assert ended.tokenizer.end_ids == {ends_with}
    (found,) = continue_prompts(
        ended.model,
        [ids],
        max_new_tokens=30,
        sampling=GREEDY,
        seed=0,
        end_ids=ended.tokenizer.end_ids,
    )
    assert found == free[: free.index(ends_with) + 1]


def test_shards_are_read_as_one(tmp_path):
    theirs = llama()
    source = folder(tmp_path / "hf", theirs, max_shard_size="10KB")
    shards = sorted(source.glob("model-*.safetensors"))
    assert len(shards) > 2
    model = ours(converted(source, tmp_path / "here")).model
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, **CLOSE)


def test_weights_of_16_bits_become_float32(tmp_path):
    theirs = llama().to(torch.bfloat16)
    model = ours(converted(folder(tmp_path / "hf", theirs), tmp_path / "here")).model
    for name, weight in theirs.float().state_dict().items():
        if "layers.1.mlp.up_proj" in name:
            assert torch.equal(model.state_dict()["layers.1.ffn.up_proj.weight"], weight)


def test_the_tokenizer_comes_with_it_and_goes_back(tmp_path):
    source = folder(tmp_path / "hf")
    here = converted(source, tmp_path / "here")
    back = converted(here, tmp_path / "back", "to=hf")
    text = "The king said in 1595: <|end|> na\u00efve\n  what?"
    one, two = (AutoTokenizer.from_pretrained(place)(text).input_ids for place in (source, back))
    assert one == two == ours(here).tokenizer.encode(text).tolist()


def test_nothing_of_ours_imports_transformers():
    # torchmetrics, which Lightning brings, does so where it finds it.
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", ())]
            modules = [getattr(node, "module", None) or "", *names]
            assert not any(name.split(".")[0] == "transformers" for name in modules), file


def edited(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def config_with(**values):
    return lambda path: edited(path, "config.json", lambda content: content.update(values))


def shards_without_one(path):
    for file in path.iterdir():
        file.unlink()
    folder(path, max_shard_size="10KB")
    sorted(path.glob("model-*.safetensors"))[1].unlink()


def as_pickle(path):
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


BROKEN = {
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors"),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle, which is not read"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a shard less": (shards_without_one, "has no model-00002-of-"),
    "damaged config": (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
    "damaged weights": (
        lambda p: (p / "model.safetensors").write_bytes(b"x" * 100),
        "model.safetensors is damaged",
    ),
    "damaged tokenizer": (
        lambda p: (p / "tokenizer.json").write_text("{}"),
        "tokenizer.json cannot be read",
    ),
    "another architecture": (config_with(model_type="gpt2"), "model_type=gpt2: must be llama"),
    "biases": (config_with(attention_bias=True), "attention_bias=True: must be False"),
    "another activation": (config_with(hidden_act="gelu"), "hidden_act=gelu: must be silu"),
    "scaled positions": (
        config_with(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}),
        "rope_type=llama3: must be default",
    ),
    "no width": (config_with(hidden_size=None), "hidden_size=None: must be a number above 0"),
    "another width": (config_with(intermediate_size=40), "is (32, 24), must be (40, 24)"),
    "more layers": (config_with(num_hidden_layers=4), "has no model.layers.3."),
    "a smaller vocabulary": (config_with(vocab_size=260), "vocab_size=260: the tokenizer has"),
    "another vocabulary": (config_with(vocab_size=310), "vocab_size=310: the embedding has 300"),
    "heads that do not divide": (config_with(num_key_value_heads=3), "num_kv_heads=3: must divide"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_bad_folder_is_one_line(damage, message, tmp_path, capsys):
    source = folder(tmp_path / "hf")
    damage(source)
    capsys.readouterr()
    assert main([f"source={source}", f"out={tmp_path / 'here'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"source={source}: " in line and message in line
    assert not (tmp_path / "here").exists()


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, capsys):
    source = folder(tmp_path / "hf")
    edited(source, "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))
    assert main([f"source={source}", f"out={tmp_path / 'here'}"]) == 2
    assert "a byte-level tokenizer is needed" in capsys.readouterr().err
