import json

import pytest

from src import describe
from src.run import describe_run


@pytest.fixture(autouse=True)
def _memory_is_not_asked_for(monkeypatch):
    """It takes a pass through two blocks, of which tests/config/test_memory_estimate.py holds it.

    Of the larger models these are gigabytes, which PyTorch keeps for the rest of the process.
    """
    monkeypatch.setattr(describe_run, "predict_memory", lambda *_, **__: None)


def sizes(capsys, *arguments: str) -> dict:
    assert describe.main([*arguments, "format=json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_smollm2_135m_has_exactly_its_parameters(capsys):
    size = sizes(capsys, "model=smollm2_135m", "attention=gqa", "ffn=mlp")
    assert size["params_total"] == size["params_active"] == 134_515_008
    assert size["cache_bytes_per_token"] == 2 * 3 * 64 * 30 * 4


def test_smoldeepseek_rounds_to_916m_with_385m_active(capsys):
    size = sizes(capsys, "model=smoldeepseek_916m", "attention=mlha", "ffn=moe")
    assert size["params_total"] == 915_841_344
    assert size["params_active"] == 384_999_744
    assert size["cache_bytes_per_token"] == (96 + 42) * 30 * 4
    normed = sizes(capsys, "model=smoldeepseek_916m", "attention.latent_norm=true")
    assert normed["params_total"] - size["params_total"] == 5760


def test_flops_by_hand(capsys):
    size = sizes(capsys, "attention=gqa", "ffn=mlp", "model.vocab_size=256", "recipe.seq_len=128")
    layer = 4 * 96 * 96 + 3 * 96 * 192
    products = 4 * layer + 256 * 96
    norms = (2 * 4 + 1) * 96
    scores_and_sums = 4 * 2 * 2 * 96 * 129 / 2
    assert size["forward_flops_per_token"] == 2 * (products + norms) + scores_and_sums
    assert size["flops_per_token"] == 3 * size["forward_flops_per_token"]


def test_a_checkpoint_with_averaged_weights_is_a_third_larger(capsys):
    plain = sizes(capsys)["checkpoint_bytes"]
    assert sizes(capsys, "stability=ema")["checkpoint_bytes"] == plain * 4 / 3


def test_a_known_speed_gives_hours(capsys):
    given = "recipe.max_steps=9000", "recipe.batch_size=4", "recipe.seq_len=100"
    assert sizes(capsys, *given)["hours"] is None
    assert sizes(capsys, *given, "tokens_per_second=500")["hours"] == 2.0
    # Ends at 7/11 of the steps.
    stopped = sizes(capsys, *given, "stability=early_stop", "tokens_per_second=500")["hours"]
    assert stopped == pytest.approx(2.0 * 7 / 11, rel=1e-3)


@pytest.mark.parametrize("speed", ["0", "-1", "nan", "inf", "fast"])
def test_a_speed_that_is_none_is_refused(speed, capsys):
    assert describe.main([f"tokens_per_second={speed}"]) == 2
    error = capsys.readouterr().err
    assert "tokens_per_second=" in error and error.count("\n") == 1


def test_the_table_shows_the_figures(capsys):
    assert describe.main(["model=smollm2_135m", "attention=gqa", "ffn=mlp"]) == 0
    text = capsys.readouterr().out
    assert "134,515,008" in text
    assert "46,080" in text


@pytest.mark.parametrize("model", ["proxy", "small", "stress", "smollm2_135m", "smoldeepseek_916m"])
@pytest.mark.parametrize("ffn", ["mlp", "moe"])
@pytest.mark.parametrize("attention", ["gqa", "mlha"])
def test_each_part_goes_with_each_size(model, attention, ffn, capsys):
    size = sizes(capsys, f"model={model}", f"attention={attention}", f"ffn={ffn}")
    assert 0 < size["params_active"] <= size["params_total"]
