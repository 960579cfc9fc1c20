"""How bounds go through each operation: from what is known of operands to the result.

A rule may only say what holds for every value of its operands within their bounds. An operation
without a rule gives unknown values.
"""

from nonfinite.auditing.elementwise_rules import ELEMENTWISE
from nonfinite.auditing.movement_rules import MOVEMENTS
from nonfinite.auditing.reduction_rules import REDUCTIONS
from nonfinite.auditing.value_ranges import Known, Rule, Step

TRANSFERS: dict[str, Rule] = {**ELEMENTWISE, **REDUCTIONS, **MOVEMENTS}
"""The rule of each operation, by its name in torch's native library."""

IN_ALL_RESULTS = ("split", "split_with_sizes", "unbind", "chunk")
"""Operations all of whose results follow the rule; of others the first alone does."""


def transfer(step: Step, place: int = 0) -> Known | None:
    """What is known of a result of an operation; None if nothing is.

    Args:
        step: the operation.
        place: which of its results.
    """
    rule = TRANSFERS.get(step.name)
    if rule is None or (place and step.name not in IN_ALL_RESULTS):
        return None
    try:
        return rule(step)
    # A rule that meets operands of an unknown kind knows nothing.
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError):
        return None
