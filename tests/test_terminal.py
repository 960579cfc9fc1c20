"""What the user sees is what was said."""

import pytest

from src import terminal

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
