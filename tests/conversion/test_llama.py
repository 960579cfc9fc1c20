"""Models of the Llama type in and out, against transformers, which the command never imports."""

import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.checkpoint.trained_model import load_trained
from src.conversion.llama_weights import llama_names
from src.convert import main
from src.generation.decode import continue_prompts
from src.generation.sampling import Sampling
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_become_float32(dtype, tmp_path):
    theirs = llama().to(dtype)
    source = folder(tmp_path / "hf", theirs, max_shard_size="10KB")
    model = ours(converted(source, tmp_path / "here")).model
    expected = theirs.float().state_dict()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, expected[llama_names(3)[name]]), name


def test_what_follows_from_other_fields_is_no_weight_too_many(tmp_path):
    source = folder(tmp_path / "hf")
    rewritten(source, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": ONE}))
    rewritten(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    converted(source, tmp_path / "here")


def test_the_tokenizer_comes_with_it_and_goes_back(tmp_path):
    source = folder(tmp_path / "hf")
    here = converted(source, tmp_path / "here")
    back = converted(here, tmp_path / "back", "to=hf")
    text = "The king said in 1595: <|end|> na\u00efve\n  what?"
    one, two = (AutoTokenizer.from_pretrained(place)(text).input_ids for place in (source, back))
    assert one == two == ours(here).tokenizer.encode(text).tolist()


def test_nothing_of_ours_imports_transformers_but_models_that_are_not_ours():
    # torchmetrics, which Lightning brings, does so where it finds it.
    foreign = {
        "src/examples/llama.py",
        "src/examples/mixtral.py",
        "src/lab/detector/faults.py",
        "src/lab/audit/survey_models.py",
        "src/lab/benchmark/transformers_models.py",
        "src/lab/detector/compare_tools.py",
        # The callback for its Trainer.
        "src/nonfinite/transformers.py",
    }
    for file in (ROOT / "src").rglob("*.py"):
        if str(file.relative_to(ROOT)) in foreign:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            named = node.names if isinstance(node, ast.Import | ast.ImportFrom) else ()
            names = [alias.name for alias in named]
            modules = [getattr(node, "module", None) or "", *names]
            assert not any(name.split(".")[0] == "transformers" for name in modules), file


def edited(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    (path / name).write_text(json.dumps(content))


def config_with(**values):
    return lambda path: edited(path, "config.json", lambda content: content.update(values))


ONE = torch.ones(1)


def rewritten(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def tensors_with(**values):
    return lambda path: rewritten(path, lambda tensors: tensors.update(values))


def as_integers(path):
    rewritten(path, lambda t: t.update({name: w.to(torch.int8) for name, w in t.items()}))


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
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle"),
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
    "no width": (config_with(hidden_size=None), "hidden_size=None: must be an integer from 1"),
    "a broken width": (config_with(hidden_size=24.0), "hidden_size=24.0: must be an integer"),
    "text for a number": (config_with(num_key_value_heads="2"), "num_key_value_heads=2: must be"),
    "too many layers": (config_with(num_hidden_layers=10**9), "an integer from 1 to 4096"),
    "an endless context": (config_with(max_position_embeddings=10**12), "must be an integer"),
    "an endless base": (config_with(rope_parameters={"rope_theta": 10**400}), "must be a number"),
    "text for a base": (config_with(rope_parameters={"rope_theta": "1"}), "rope_theta=1: must be"),
    "no object": (config_with(rope_parameters=[1]), "rope_parameters=[1]: must be an object"),
    "an end beyond": (config_with(eos_token_id=300), "eos_token_id=[300]: must be a token below"),
    "tied in words": (config_with(tie_word_embeddings="false"), "must be true or false"),
    "an end in words": (config_with(eos_token_id=[0, "a"]), "must be a token below"),
    "quantised": (config_with(quantization_config={"bits": 4}), "must be null"),
    "integers": (as_integers, "is torch.int8; must be a float"),
    "a bias": (
        tensors_with(**{"model.layers.0.self_attn.q_proj.bias": ONE}),
        "model.layers.0.self_attn.q_proj.bias is not a Llama weight",
    ),
    "a layer too many": (
        config_with(num_hidden_layers=2),
        "is not a Llama weight (9 unknown weights)",
    ),
    "not a number": (
        tensors_with(**{"model.norm.weight": torch.full((24,), torch.nan)}),
        "final_norm.weight is not finite",
    ),
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
    assert line.startswith(f"error: source={source}: ") and message in line
    assert line.count("source=") == 1
    assert not (tmp_path / "here").exists()


def test_a_config_may_leave_out_what_has_one_meaning(tmp_path):
    source = folder(tmp_path / "hf", llama(num_key_value_heads=4, head_dim=6))

    def shorten(content):
        for name in ("num_key_value_heads", "head_dim", "hidden_act", "eos_token_id"):
            content.pop(name, None)
        content["initializer_range"] = None

    edited(source, "config.json", shorten)
    trained = ours(converted(source, tmp_path / "here"))
    assert trained.parts.model.init_std == 0.02
    written = json.loads(
        (converted(tmp_path / "here", tmp_path / "back", "to=hf") / "config.json").read_text()
    )
    assert written["initializer_range"] == 0.02 and written["eos_token_id"] is None


def test_tokens_that_end_a_text_go_back(tmp_path):
    source = folder(tmp_path / "hf")
    edited(source, "config.json", lambda content: content.update(eos_token_id=[7, 3]))
    back = converted(converted(source, tmp_path / "here"), tmp_path / "back", "to=hf")
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == [3, 7]


def test_more_tokens_that_end_a_text_stand_in_the_generation_config(tmp_path):
    source = folder(tmp_path / "hf")
    edited(source, "config.json", lambda content: content.update(eos_token_id=3))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    assert ours(converted(source, tmp_path / "here")).tokenizer.end_ids == {3, 9}


def test_averaged_weights_are_asked_of_a_run_alone(tmp_path, capsys):
    source = folder(tmp_path / "hf")
    assert main([f"source={source}", f"out={tmp_path / 'here'}", "weights=ema"]) == 2
    assert "weights=ema: " in capsys.readouterr().err


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, capsys):
    source = folder(tmp_path / "hf")
    edited(source, "tokenizer.json", lambda content: content.update(decoder={"type": "Fuse"}))
    assert main([f"source={source}", f"out={tmp_path / 'here'}"]) == 2
    assert "use a byte-level tokenizer" in capsys.readouterr().err
