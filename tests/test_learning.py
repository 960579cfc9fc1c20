"""What a trained model is worth: its loss beside that of a bigram model on the same split."""

from pathlib import Path

import numpy as np
import pytest

from src.config.compose import compose
from src.train import main
from tests.runs import record, train


def bigram_loss(arguments: list[str]) -> float:
    """Validation cross-entropy of add-one-smoothed bigram counts, nats a token."""
    config = compose("train", arguments)
    corpus = config.data.load(
        config.tokenizer, cache=Path(config.paths.cache), seq_len=config.recipe.seq_len
    )
    size = corpus.tokenizer.vocab_size
    counts = np.ones((size, size))
    np.add.at(counts, (corpus.train[:-1], corpus.train[1:]), 1)
    log_probability = np.log(counts / counts.sum(axis=1, keepdims=True))
    return float(-log_probability[corpus.val[:-1], corpus.val[1:]].mean())


def show(name: str, loss: float, bigram: float) -> None:
    print(f"{name}: val/loss {loss:.3f}, bigram {bigram:.3f}")


def test_the_bigram_figure_is_that_of_characters_of_shakespeare(tiny):
    arguments = [a for a in tiny if "max_chars" not in a]
    # English text by pairs of letters: about 3.5 bits a character.
    assert 2.3 < bigram_loss(arguments) < 2.6


@pytest.mark.slow
def test_seconds_of_training_beat_a_bigram_model(tmp_path, monkeypatch, shared_cache):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "preset=smoke",
        "tracking=local",
        f"paths.cache={shared_cache}",
        "recipe.max_steps=400",
        "recipe.precision=32-true",
        "stability=ema",
        "stability.ema.decay=0.98",
    ]
    final = record(train(arguments))["final"]
    bigram = bigram_loss(arguments)
    show("400 smoke steps", final["val_ema/loss"], bigram)
    assert final["val_ema/loss"] < bigram - 0.1
    assert final["val_ema/loss"] < final["val/loss"]


def test_a_model_with_more_words_than_its_tokenizer_writes_its_samples(tiny):
    folder = train([*tiny, "model.vocab_size=2000", "recipe.max_steps=4"])
    assert record(folder)["status"] == "finished"
    assert (folder / "samples.md").is_file()


@pytest.mark.slow
def test_the_readme_run_ends_well_under_a_bigram_model(tmp_path, monkeypatch, shared_cache, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["attention=mlha", "ffn=moe", "stability=ema", f"paths.cache={shared_cache}"]
    assert main([*arguments, "tracking=local"]) == 0
    out = capsys.readouterr().out
    assert "Once upon a time" in out
    assert "samples.md" in out
    (path,) = Path("runs").rglob("record.json")
    final, bigram = record(path.parent)["final"], bigram_loss(arguments)
    with capsys.disabled():
        show("laptop", final["val/loss"], bigram)
    assert final["val/loss"] < bigram - 0.6
    assert final["val_ema/loss"] < bigram - 0.7
