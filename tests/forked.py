"""Commands and scripts in processes that are forked from the one that tests.

Python needs seconds to import what a command needs, and this process has imported it. What depends
on a start of Python's own is tested with `tests.runs.start` instead. Charts that a forked process
draws are blank.
"""

import atexit
import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from nonfinite import closing_line


class Forked(subprocess.Popen[str]):
    """A process that is forked to call a function, and behaves as any other from outside.

    Args:
        call: its return value, or that of the SystemExit that it raises, is the exit code.
        stdin, stderr, settings: see subprocess.Popen.
    """

    def __init__(
        self, call: Callable[[], int | None], *, stdin: Any = subprocess.DEVNULL, **settings: Any
    ) -> None:
        self.call = call
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        super().__init__(["forked"], stdin=stdin, text=True, **{**pipes, **settings})

    def _execute_child(self, args: Any, *settings: Any) -> None:
        """Takes the place of subprocess's own, which starts a program."""
        cwd, env = settings[4:6]
        pipes = settings[9:15]
        read_in, write_in, read_out, write_out, read_err, write_err = pipes
        self.pid = os.fork()
        if self.pid == 0:
            for end in {write_in, read_out, read_err} - {-1}:
                # Else who waits for the end of a stream would wait for this process.
                os.close(end)
            _be_a_command(self.call, cwd, env or {}, streams=(read_in, write_out, write_err))
        self._child_created = True
        self._close_pipe_fds(*pipes)


def _be_a_command(
    call: Callable[[], int | None],
    cwd: Path | None,
    env: Mapping[str, str],
    *,
    streams: tuple[int, int, int],
) -> NoReturn:
    """Makes of a forked test what Python makes of a new process, and ends it."""
    code = 1
    try:
        # What pytest and its plugins would do at their end is not for this process.
        atexit._clear()
        atexit.register(closing_line._say_all)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        use_standard_streams()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        warnings.resetwarnings()
        # No thread has come along.
        torch.set_num_threads(1)
        os.environ.update(env)
        os.chdir(cwd or ".")
        code = _exit_code(call)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def use_standard_streams() -> None:
    """In a forked process, where pytest has replaced them."""
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, "utf-8", "backslashreplace", closefd=False)


def _exit_code(call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        print(ended.code, file=sys.stderr)
        return 1


def fork(command: str, arguments: Sequence[str], cwd: Path, **env: str) -> Forked:
    """As `tests.runs.start`, but forked."""
    main = importlib.import_module(f"src.{command}").main
    if command == "train":
        # A command imports these when it needs them; here they are to be there already.
        importlib.import_module("src.sweep.runner")
        importlib.import_module("src.run.lifecycle")

    def call() -> int:
        sys.path.insert(0, os.getcwd())
        code: int = main(list(arguments))
        return code

    return Forked(call, cwd=cwd, env=env)


def fork_rank(command: Sequence[str], **settings: Any) -> Forked:
    """Takes the place of subprocess.Popen where src.run.ddp starts another rank of a run."""
    (_, module) = command[1:]
    main = importlib.import_module(module).main
    return Forked(main, **{name: value for name, value in settings.items() if name != "text"})


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """What `python FILE` or `python -m MODULE`, each with arguments, makes in a fork."""

    def call() -> None:
        is_module = words[0] == "-m"
        script, *arguments = words[1:] if is_module else words
        sys.argv = [script, *arguments]
        if is_module:
            sys.path.insert(0, os.getcwd())
            # Of a module that is imported already, Python warns.
            sys.modules.pop(f"{script}.__main__", None)
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).resolve().parent))
            runpy.run_path(script, run_name="__main__")

    process = Forked(call)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
