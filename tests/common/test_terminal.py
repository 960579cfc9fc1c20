"""What the user sees is what was said."""

import contextlib
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from src import generate
from src.common import terminal
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


def screen_lines(text: str) -> list[str]:
    """What a terminal was sent, in lines, without colours and movements of the cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@contextlib.contextmanager
def on_terminal() -> Iterator[list[str]]:
    """Both streams on one terminal; the list holds, afterwards, what was written there."""
    ours, theirs = os.openpty()
    pieces, written = [], []

    def read() -> None:
        # Linux reports the end as an error.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 4096):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    with (
        open(theirs, "w", buffering=1) as out,
        open(theirs, "w", buffering=1, closefd=False) as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield written
    reader.join()
    os.close(ours)
    written.append(b"".join(pieces).decode())


@contextlib.contextmanager
def bar():
    progress = terminal.StepProgress(total=9, done=0)
    progress.update(3, {"tok/s": "2140"})
    yield
    progress.close()


@contextlib.contextmanager
def board():
    jobs = terminal.JobBoard()
    jobs.open()
    jobs.show({"none/seed-0": terminal.JobProgress(step=1, total=9, loss=2.0, left=1)}, left=1)
    if jobs._live is not None:
        jobs._live.refresh()
    yield
    jobs.close()


@contextlib.contextmanager
def count():
    with terminal.counting("composing", total=9, unit="runs") as move:
        move(3)
        yield


def logged(line: str) -> None:
    logging.getLogger("a.library").warning(line)


WAYS = {
    "say": terminal.say,
    "warning: ": terminal.warn,
    "error: ": terminal.error,
    "table": lambda line: terminal.table(line, ["a"], [["b"]]),
    "print": lambda line: print(line, file=sys.stderr),
    "logging": logged,
}


@pytest.fixture(autouse=True)
def _colours(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("drawn", [bar, board, count])
@pytest.mark.parametrize("way", WAYS)
def test_a_line_stands_above_what_is_drawn(way, drawn):
    logger = logging.getLogger("a.library")
    with on_terminal() as written:
        handler = logging.StreamHandler()
        begun_with = handler.stream
        logger.addHandler(handler)
        try:
            with drawn():
                WAYS[way]("one line of its own")
                WAYS[way]("and another")
        finally:
            logger.removeHandler(handler)
    prefix = way if way.endswith(" ") else ""
    shown = screen_lines(written[0])
    assert f"{prefix}one line of its own" in shown
    assert f"{prefix}and another" in shown
    assert handler.stream is begun_with


def test_errors_that_go_to_a_file_do_not_appear_on_the_terminal(tmp_path):
    file = tmp_path / "err"
    with on_terminal() as written, file.open("w") as err, contextlib.redirect_stderr(err), bar():
        terminal.warn("of this run")
        print("of a library", file=sys.stderr)
    assert file.read_text() == "warning: of this run\nof a library\n"
    assert "of a" not in written[0]


def test_nothing_but_text_goes_where_there_is_no_terminal(capsys):
    for drawn in (bar, board, count):
        with drawn():
            terminal.warn("of this run")
    shown = capsys.readouterr()
    assert shown.err == 3 * "warning: of this run\n"
    assert shown.out == ""


@pytest.mark.parametrize("way", [terminal.warn, terminal.error, terminal.sentence])
def test_a_sentence_on_a_terminal_is_cut_between_words_and_a_path_never(way):
    path = "runs/" + "x" * 100
    with on_terminal() as written:
        way(f"{'word ' * 30}{path}")
    shown = screen_lines(written[0])
    assert path in shown
    words = {word for line in shown for word in line.split()}
    assert words - {"warning:", "error:"} == {"word", path}


def test_what_is_to_be_copied_stays_one_line_of_a_terminal():
    command = "python -m src.replay incident=runs/" + "x" * 100
    with on_terminal() as written:
        terminal.say(command)
    assert command in screen_lines(written[0])


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
