"""A run that begins from a state which another run has saved: what is typed, and its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from src.common.errors import InputError, damaged
from src.common.override_grammar import Override, file_arguments
from src.config.field_roles import role_of


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Where a run begins."""

    source: Path
    """The run folder whose state it is."""
    step: int
    """Steps that the source had made."""

    @property
    def state(self) -> Path:
        """The saved state; what its content hangs on is in the .key beside it."""
        return self.source / "checkpoints" / f"state-{self.step}.ckpt"

    @property
    def key(self) -> str | None:
        """What the saved state hangs on; None where none is saved."""
        file = self.state.with_suffix(".key")
        # What is damaged equals no key.
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def source_config(self) -> dict[str, Any]:
        """config.yaml of the source.

        Raises:
            InputError: there is no such run, or the file is damaged.
        """
        file = self.source / "config.yaml"
        if not file.is_file():
            raise InputError(f"fork={self.source}@{self.step}: {self.source} is no run folder")
        is_converted = (self.source / "conversion.json").is_file()
        with damaged(file, advice="a branch needs another source"):
            config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not is_converted:
                # The last line of a run's, so that what was cut has none.
                config["config_hash"]
        if is_converted:
            raise InputError(
                f"fork={self.source}@{self.step}: {self.source} is a converted model;"
                f" init={self.source} trains it on"
            )
        return config

    def check(self, *, last_step: int) -> None:
        """Raises InputError where nothing is saved at the step, or nothing is left to train."""
        text = f"fork={self.source}@{self.step}"
        if not self.state.is_file():
            steps = sorted(
                int(f.stem.partition("-")[2]) for f in self.state.parent.glob("state-*.ckpt")
            )
            saved = ", ".join(map(str, steps)) or "none"
            raise InputError(
                f"{text}: no state is saved at that step (saved: {saved});"
                f" rerun=true save_at=[{self.step}] on that run saves one"
            )
        if self.step >= last_step:
            raise InputError(f"{text}: must be before step {last_step}, the run's last")


def parse_fork(text: str | None) -> Fork | None:
    """`<run folder>@<step>`; a variant's name holds @, so the last one counts.

    Raises:
        InputError: it is something else.
    """
    if text is None:
        return None
    folder, _, step = text.rpartition("@")
    if not folder or not step.isdigit():
        raise InputError(f"fork={text}: must be <run folder>@<step>")
    return Fork(source=Path(folder), step=int(step))


def inherited(typed: Sequence[Override], arguments: Sequence[str]) -> list[str]:
    """The arguments of a fork: those of its source, where they are not typed anew, and its own."""
    texts = [override.text for override in typed if override.key == "fork"]
    fork = parse_fork(texts[-1]) if texts and texts[-1] != "null" else None
    if fork is None:
        return list(arguments)
    keys = {override.key for override in typed}
    taken = file_arguments(
        fork.source_config().get("arguments", []),
        where=f"fork={fork.source}@{fork.step}: config.yaml",
        is_dropped=lambda key: key in keys or not role_of(key).inherited,
    )
    return [*taken, *arguments]
