"""The two parts of a text."""

import pytest

from src.common.errors import InputError
from src.config.compose import compose
from src.conversion.texts import NUM_HELD_OUT, WINDOW, cut_windows, read_text
from src.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
DEFAULT = compose("train", ["data=shakespeare"]).data


def texts(path, **given):
    values = {"num_tokens": 2048, "context": 64, "val_frac": 0.1}
    return cut_windows(
        read_text(str(path), DEFAULT), BYTES, field="calibration", **(values | given)
    )


def lines(tokens_BT):
    """Numbers of the lines that stand whole in the windows."""
    return [
        int(line)
        for row in tokens_BT
        for line in BYTES.decode(row.tolist()).split("\n")[1:-1]
        if line
    ]


def test_losses_are_measured_where_the_fit_has_not_looked(tmp_path):
    file = tmp_path / "numbers"
    file.write_text("".join(f"{number:06d}\n" for number in range(20_000)))
    found = texts(file)
    assert max(lines(found.fit_BT)) < 18_000 <= min(lines(found.held_out_BT))
    # All over both parts.
    assert min(lines(found.fit_BT)) < 100 and max(lines(found.fit_BT)) > 16_000
    assert max(lines(found.held_out_BT)) > 19_000
    assert found.fit_BT.shape == (2048 // 64, 64)
    # A number of tokens without bounds costs no more than the text has.
    assert texts(file, num_tokens=10**12).fit_BT.numel() <= 18_000 * 7
    assert found.held_out_BT.shape == (NUM_HELD_OUT // 64, 64)


def test_windows_are_no_longer_than_the_context_and_no_wider_than_it_pays():
    assert texts("shakespeare", context=16).fit_BT.shape[1] == 16
    assert texts("shakespeare", context=8192).fit_BT.shape[1] == WINDOW


def test_a_short_text_gives_fewer_windows_and_a_shorter_one_none(tmp_path):
    file = tmp_path / "short"
    file.write_text("x" * 2000)
    assert texts(file).fit_BT.shape[0] < 2048 // 64
    file.write_text("x" * 300)
    with pytest.raises(InputError, match="shorter than a window of 64 tokens"):
        texts(file)


def test_the_embedded_text_is_fitted_to_where_a_run_trains(tmp_path):
    config = compose("train", ["tokenizer=byte"])
    corpus = config.data.load(config.tokenizer, cache=tmp_path, seq_len=16)
    found = texts("shakespeare", num_tokens=10**9)
    train, val = (bytes(part.astype("uint8")) for part in (corpus.train, corpus.val))
    assert all(bytes(row.tolist()) in train for row in found.fit_BT)
    assert all(bytes(row.tolist()) in val for row in found.held_out_BT)
    assert found.fit_BT.numel() > 0.9 * len(train)
