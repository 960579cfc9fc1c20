"""A small run of the command with one option, beside its baseline."""

from pathlib import Path

from tests.runs import made, metrics, train

STEPS = 22
START = 12
"""6/11 of the steps: the last step before a late option acts."""
PACE = (f"recipe.max_steps={STEPS}", "recipe.log_every=1", "recipe.num_validations=2")


def runs(tiny: list[str], option: str, *more: str) -> tuple[Path, Path]:
    """The folders of the baseline and of the option, with the same other arguments."""
    shared = [a for a in more if not a.startswith("stability.")]
    plain = made(tiny, *PACE, "study=baseline", *shared)
    treated = train(tiny, *PACE, f"stability={option}", "study=treated", *more)
    return plain, treated


def first_difference(plain: Path, treated: Path) -> int | None:
    """The first step at which a figure that both log differs; None where none does."""
    for one, two in zip(metrics(plain), metrics(treated), strict=False):
        common = one.keys() & two.keys()
        if any(one[name] != two[name] for name in common):
            return int(one["step"])
    return None


def figure(folder: Path, name: str) -> dict[int, float]:
    """A metric by step."""
    return {int(line["step"]): line[name] for line in metrics(folder) if name in line}
