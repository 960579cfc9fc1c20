"""What the user sees is what was said."""

import io
import sys

import pytest

from src import generate, terminal
from src.train import main

AWKWARD = [
    "pkg:leaves: is a name, :smile: too",
    "[bold]no markup[/bold], [red]",
    "a path\\",
    "x" * 300,
    "{braces} 12 'quotes' http://127.0.0.1:5000",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_text_is_shown_as_it_is(text, capsys):
    terminal.say(text)
    terminal.warn(text)
    terminal.error(text)
    terminal.table("", ["name"], [[text[:60]]])
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{text}\n")
    assert text[:60] in shown.out.removeprefix(text)
    assert shown.err == f"warning: {text}\nerror: {text}\n"


def test_letters_that_a_terminal_lacks_are_shown_by_their_code(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["--help"]) == 0
    terminal.say("a café")
    out.flush()
    assert b"a caf\\xe9" in out.buffer.getvalue()


@pytest.mark.parametrize(("command", "field"), [(main, "study"), (generate.main, "prompt")])
def test_an_argument_that_the_locale_cannot_read_is_refused(command, field, capsys):
    assert command([f"{field}=caf\udcc3\udca9"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"{field}=caf" in line
    assert "LC_ALL=C.UTF-8" in line
