"""The field `fork`: a run that starts from a state saved by another run."""

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
    """The saved state that a branch starts from."""

    source: Path
    """The run folder that holds the state."""
    step: int
    """The number of steps that the source had made."""

    @property
    def state(self) -> Path:
        """The file of the saved state; `key` is in the file beside it that ends in .key."""
        return self.source / "checkpoints" / f"state-{self.step}.ckpt"

    @property
    def key(self) -> str | None:
        """A hash of everything that the saved state depends on; None if no state is saved."""
        file = self.state.with_suffix(".key")
        # A damaged file must not raise here; its text matches no key.
        return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None

    def source_config(self) -> dict[str, Any]:
        """config.yaml of the source.

        Raises:
            InputError: the source is not a run folder, or the file is damaged.
        """
        file = self.source / "config.yaml"
        if not file.is_file():
            raise InputError(f"fork={self.source}@{self.step}: {self.source} is not a run folder")
        is_converted = (self.source / "conversion.json").is_file()
        with damaged(file, advice="a branch needs another source"):
            config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            if not is_converted:
                # config_hash is the last line, so a truncated file lacks it: KeyError.
                config["config_hash"]
        if is_converted:
            raise InputError(
                f"fork={self.source}@{self.step}: {self.source} is a converted model, not a run;"
                f" type init={self.source} to train it"
            )
        return config

    def check(self, *, last_step: int) -> None:
        """Raises InputError if no state is saved at the step, or no step is left to train."""
        text = f"fork={self.source}@{self.step}"
        if not self.state.is_file():
            steps = sorted(
                int(f.stem.partition("-")[2]) for f in self.state.parent.glob("state-*.ckpt")
            )
            saved = ", ".join(map(str, steps)) or "none"
            raise InputError(
                f"{text}: no state is saved at that step (saved: {saved}); train that run again"
                f" with rerun=true save_at=[{self.step}]"
            )
        if self.step >= last_step:
            raise InputError(f"{text}: must be before step {last_step}, the run's last")


def parse_fork(text: str | None) -> Fork | None:
    """Parses `<run folder>@<step>`.

    Raises:
        InputError: the text has another form.
    """
    if text is None:
        return None
    # The name of a variant may hold @ as well, so the last one counts.
    folder, _, step = text.rpartition("@")
    if not folder or not step.isdigit():
        raise InputError(f"fork={text}: must be <run folder>@<step>")
    return Fork(source=Path(folder), step=int(step))


def with_inherited(typed: Sequence[Override], arguments: Sequence[str]) -> list[str]:
    """The arguments of a branch: those inherited from its source, then its own.

    Fields that are typed for the branch are not inherited. Without a fork, `arguments` unchanged.
    """
    texts = [override.text for override in typed if override.key == "fork"]
    fork = parse_fork(texts[-1]) if texts and texts[-1] != "null" else None
    if fork is None:
        return list(arguments)
    keys = {override.key for override in typed}
    inherited = file_arguments(
        fork.source_config().get("arguments", []),
        where=f"fork={fork.source}@{fork.step}: config.yaml",
        is_dropped=lambda key: key in keys or not role_of(key).inherited,
    )
    return [*inherited, *arguments]
