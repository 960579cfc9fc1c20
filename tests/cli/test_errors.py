"""Bad input: one line that names field, value and what is allowed; exit code 2; nothing written."""

from pathlib import Path

import numpy as np
import pytest
import torch

from src import describe
from src.train import main
from tests.runs import start

CASES = {
    "model.hidden_dim=97": ["model.hidden_dim=97", "divisible by num_heads=3", "model.head_dim"],
    "attention.rope_dim=15": ["attention.rope_dim=15", "even"],
    "attention.rope_dim=64": ["attention.rope_dim=64", "at most head_dim=32"],
    "attention=gqa attention.num_kv_heads=2": ["attention.num_kv_heads=2", "model.num_heads=3"],
    "ffn.top_k=8": ["ffn.top_k=8", "from 1 to ffn.num_routed=7"],
    "ffn.router.balance=luck": ["ffn.router.balance=luck", "bias, aux, none"],
    "recipe.warmup_frac=1.5": ["recipe.warmup_frac=1.5", "longer than the run"],
    "recipe.seq_len=200000": ["recipe.seq_len=200000", "below the 111539 tokens"],
    "recipe.max_steps=abc": ["recipe.max_steps=abc", "an integer"],
    "recipe.max_steps=null": ["recipe.max_steps=null", "not null"],
    "recipe.max_steps=0": ["recipe.max_steps=0", "at least 1"],
    "recipe.betas=0.9": ["recipe.betas=0.9", "a list"],
    "recipe.betas=[0.9,1.0]": ["recipe.betas=[0.9, 1.0]", "below 1"],
    "recipe.precision=fp8": ["recipe.precision=fp8", "32-true, bf16-mixed"],
    "recipe.schedule=steps": ["recipe.schedule=steps", "constant, linear, cosine, wsd"],
    "recipe.clip_norm=0": ["recipe.clip_norm=0", "null for none"],
    "recipe.learnin_rate=1": ["recipe.learnin_rate", "recipe.learning_rate?"],
    "recipe=3": ["recipe=3", "wrong type"],
    "+recipe.foo=1": ["+recipe.foo=1", "field=value"],
    "guard.check=[loss,weights]": ["guard.check", "loss, gradients"],
    "guard.on_nonfinite=pray": ["guard.on_nonfinite=pray", "skip, stop, raise"],
    "data=text data.path=missing.txt": ["data.path=missing.txt", "no such file"],
    "data=text data.path=a b=c,d.txt": ["data.path=a b=c,d.txt", "no such file"],
    "data=text": ["data.path", "has no value"],
    "data=text data.path=empty.txt": ["data.path=empty.txt", "empty"],
    "data=text data.path=binary.dat": ["data.path=binary.dat", "binary"],
    "data=text data.path=latin.txt": ["data.path=latin.txt", "not UTF-8", "byte 3 is 0xe9"],
    "data=text data.path=short.txt": ["recipe.seq_len=128", "11 tokens", "training part"],
    "data=text data.path=.": ["data.path=.", "not a file"],
    "data=tokens data.path=ids.bin tokenizer.vocab_size=1000": ["ids.bin", "2999", "1000 tokens"],
    "data=tokens data.path=ids.bin": ["tokenizer.vocab_size", "has no value"],
    "data=tokens data.path=odd.bin tokenizer.vocab_size=9": ["odd.bin", "uint16"],
    "data.val_frac=1": ["data.val_frac=1", "between 0 and 1"],
    "tokenizer=smollm2 tokenizer.path=.": ["tokenizer.path=.", "tokenizer.json"],
    "tokenizer=bpe tokenizer.vocab_size=10": ["tokenizer.vocab_size=10", "from 257"],
    "model.vocab_size=10": ["model.vocab_size=10", "the tokenizer's 63 tokens"],
    "compile=perhaps": ["compile=perhaps", "true, false, auto"],
    "attention=mhla": ["attention=mhla", "did you mean mlha?", "gqa, mlha"],
    "atention=mlha": ["atention", "did you mean attention?"],
    "stability=emma": ["stability=emma", "did you mean ema?"],
    "stability=[ema,warmdwn]": ["stability=warmdwn", "did you mean warmdown?"],
    "stability=[none,ema]": ["stability=[none,ema]", "none cannot be combined with other"],
    "preset=[smoke,laptop]": ["preset=[smoke,laptop]", "must be one option"],
    "ffn.router.balance=none ffn.router.bias_use=add": ["router.bias_use=add", "balance=bias"],
    "recipe.clip_norm=inf": ["recipe.clip_norm=inf", "null for none"],
    "rerun=true resume=a.ckpt": ["resume=a.ckpt", "rerun=true starts from step 0"],
    "paths.cache=short.txt/x": ["paths.cache", "cannot be written"],
    "tokenizer=smollm2 tokenizer.path=/no/such": ["tokenizer.path=/no/such", "no such folder"],
    "data=tokens data.path=ids.bin tokenizer=char": ["tokenizer=char", "data=tokens has none"],
    "stability=null": ["stability=null", "name"],
    "stability.ema.decay=0.5": ["stability.ema.decay=0.5", "stability=ema is not on"],
    "stability=ema stability.ema.decay=1": ["stability.ema.decay=1", "below 1"],
    "stability=clip03 recipe.clip_norm=0.5": ["recipe.clip_norm=0.5", "stability=clip03"],
    "stability=clip03,ema": ["stability=clip03,ema", "--multirun"],
    "preset=huge": ["preset=huge", "laptop"],
    "seed=-1": ["seed=-1", "at least 0"],
    "study=a/b": ["study=a/b", "letters"],
    "trainer.devices=2": ["trainer.devices=2", "must be 1"],
    "trainer.threads=0": ["trainer.threads=0", "from 1 to 1024"],
    "paths.runs=short.txt/x": ["paths.runs", "short.txt/x", "cannot be written"],
    "resume=nowhere.ckpt": ["resume=nowhere.ckpt", "no such checkpoint"],
    "resume=short.txt": ["resume=short.txt", "damaged"],
    "hydra.run.dir=x": ["hydra.run.dir=x", "cannot be changed"],
    "--fast": ["--fast", "unknown flag"],
    "fast": ["fast", "field=value"],
    "--multirun stability=none,emma": ["stability=emma", "did you mean ema?"],
    "--multirun recipe.max_steps=3,0": ["recipe.max_steps=0", "at least 1"],
    "model=external model.target=a:b model.kwargs={1:2}": ["model.kwargs={1:2}", "each name text"],
    "model=external model.target=a:b model.kwargs={nan:true}": ["{nan:true}", "each name text"],
    "--multirun experiment=stability model=external model.target=a:b": [
        "experiment=stability: sets attention=mlha: model=external has its own"
    ],
}
if not torch.cuda.is_available():
    CASES["trainer=gpu"] = ["trainer.accelerator=gpu", "no GPU"]


def arguments(case: str) -> list[str]:
    """Splits at blanks that come before a new argument."""
    if "a b=c,d.txt" in case:
        return ["data=text", "data.path=a b=c,d.txt"]
    return case.split(" ")


@pytest.fixture
def bad_files(tmp_path: Path) -> Path:
    (tmp_path / "short.txt").write_text("hello world\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "binary.dat").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir\n" * 100)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    np.arange(3000, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    return tmp_path


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_one_line_and_exit_code_2_and_nothing_is_written(
    case, bad_files, monkeypatch, capsys
):
    monkeypatch.chdir(bad_files)
    before = tree(bad_files)
    code = main([*arguments(case)])
    line = capsys.readouterr().err
    assert code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    for part in CASES[case]:
        assert part in line
    written = {path for path in tree(bad_files) - before if ".cache" not in path.parts}
    assert written == set()


def test_an_unusable_corpus_leaves_no_cache_either(bad_files, monkeypatch):
    monkeypatch.chdir(bad_files)
    before = tree(bad_files)
    for case in ("data=text data.path=short.txt", "data=text data.path=latin.txt"):
        assert main(case.split()) == 2
    assert tree(bad_files) == before


@pytest.mark.parametrize(
    ("command", "case"),
    [
        pytest.param("train", "attention=mhla", marks=pytest.mark.slow),
        ("train", "recipe.warmup_frac=1.5"),
        pytest.param("describe", "model.hidden_dim=97", marks=pytest.mark.slow),
    ],
)
def test_the_same_as_a_process_of_its_own(command, case, bad_files):
    before = tree(bad_files)
    process = start(command, [case], bad_files)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in CASES[case]:
        assert part in err
    assert tree(bad_files) == before


def test_describe_refuses_what_it_does_not_know(capsys):
    assert describe.main(["format=xml"]) == 2
    assert "format=xml: must be one of text, json" in capsys.readouterr().err
    assert describe.main(["--multirun", "seed=0,1"]) == 2


def test_help_is_short_and_names_the_groups(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 24
    assert "attention=gqa|mlha" in text
