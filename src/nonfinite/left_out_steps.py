"""Steps that a GradScaler leaves out because a gradient overflowed: the optimizer is not called."""

from collections import deque
from collections.abc import Sequence

from torch import nn

from nonfinite.forward_calls import ForwardCall

MAX_IN_A_ROW = 16
"""After this many left-out steps in a row, no scale helps, and the gradient is at fault."""


class LeftOutSteps:
    """Notices that a step was left out, by the gradients that are gone without an update.

    Attributes:
        passes: forward passes of a step that was left out and has yet to be counted.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.passes: list[ForwardCall] = []
        self._in_a_row = 0

    def are_gradients_gone(self, calls: Sequence[ForwardCall]) -> bool:
        """Whether gradients came back to some passes, and no parameter has one any more."""
        came_back = any(call.gradients for call in calls)
        return came_back and all(parameter.grad is None for parameter in self._parameters)

    def drop_earlier(self, calls: deque[ForwardCall], call: ForwardCall) -> bool:
        """Called as the backward pass of a call begins: some loops drop gradients only then.

        Returns:
            Whether the passes before the call belong to a step that was left out; then they are in
            `passes`, and no longer in `calls`.
        """
        earlier = [
            other
            for other in calls
            if other.gradients and other.backward_pass != call.backward_pass
        ]
        if not self.are_gradients_gone(earlier) or all(other.came_back_finite for other in earlier):
            return False
        self.passes = earlier
        later = [other for other in calls if all(other is not each for each in earlier)]
        calls.clear()
        calls.extend(later)
        return True

    def count(self, step: int) -> range:
        """Counts a step; returns the steps, it included, that are now known to be at fault."""
        self._in_a_row += 1
        if self._in_a_row < MAX_IN_A_ROW:
            return range(0)
        is_first = self._in_a_row == MAX_IN_A_ROW
        return range(step - MAX_IN_A_ROW + 1 if is_first else step, step + 1)

    def end(self) -> None:
        """Called when the optimizer was called."""
        self._in_a_row = 0
