"""record.json: what one run was and how it ended."""

from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA = 1


def outcome(*, guard: Mapping[str, Any], stopped: bool, weights_finite: bool, val: float) -> str:
    """How a run that reached its end went.

    Args:
        guard: the guard's summary.
        stopped: whether the guard ended the run.
        weights_finite: whether all weights are finite at the end.
        val: val/nonfinite_frac of the last validation.

    Returns:
        stopped; collapsed (over half of the last seventh skipped, or weights not finite, or no
        finite validation window); intermittent (non-finite steps, but recovered); clean.
    """
    if stopped:
        return "stopped"
    if guard["skipped_tail_frac"] > 0.5 or not weights_finite or val >= 1.0:
        return "collapsed"
    return "clean" if guard["first_nonfinite_step"] is None else "intermittent"


def final_values(
    lines: Sequence[Mapping[str, float]], validation: Mapping[str, float]
) -> dict[str, float]:
    """The figures of the last logged training line and of the last validation.

    What was not finite there is absent, however good it was earlier.
    """
    training = next((line for line in reversed(lines) if "lr" in line), {})
    values = {k: v for k, v in training.items() if k != "step" and not k.startswith("val")}
    return values | dict(validation)
