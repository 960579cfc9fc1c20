"""From logits to the next token.

Axes: V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn: first repetition_penalty is applied, then temperature, top_k, top_p."""

    temperature: float
    """Divides the logits; 0: always the most likely token."""
    top_p: float | None
    """Draws from the most likely tokens that together have this probability (arXiv 1904.09751);
    above 0, at most 1; None: from all."""
    top_k: int | None
    """Draws from this many of the most likely tokens; at least 1; None: from all."""
    repetition_penalty: float
    """Divides positive logits of tokens that are already in the text, and multiplies negative ones
    (arXiv 1909.05858, section 4.1); above 0; 1: no penalty."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: must be at least 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty={self.repetition_penalty}: must be above 0")

    def pick(self, logits_V: Tensor, text: Sequence[int], generator: torch.Generator) -> int:
        """Draws the next token.

        Args:
            logits_V: finite logits in float32 on the CPU.
            text: the tokens so far.
            generator: random generator, unused if temperature is 0.
        """
        logits_V = self._penalised(logits_V, text)
        if self.temperature == 0:
            return int(logits_V.argmax())
        probabilities_V = self.probabilities(logits_V / self.temperature)
        return int(torch.multinomial(probabilities_V, 1, generator=generator))

    def probabilities(self, logits_V: Tensor) -> Tensor:
        """Probabilities after top_k and top_p, which keep at least the most likely token."""
        if self.top_k is not None and self.top_k < len(logits_V):
            least = logits_V.topk(self.top_k).values[-1]
            logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
        probabilities_V = logits_V.softmax(dim=-1)
        if self.top_p is not None and self.top_p < 1:
            ordered_V, order_V = probabilities_V.sort(descending=True, stable=True)
            # A token is dropped if more likely tokens already reach top_p.
            dropped_V = ordered_V.cumsum(dim=-1) - ordered_V >= self.top_p
            probabilities_V = probabilities_V.index_fill(0, order_V[dropped_V], 0.0)
        return probabilities_V / probabilities_V.sum()

    def _penalised(self, logits_V: Tensor, text: Sequence[int]) -> Tensor:
        if self.repetition_penalty == 1:
            return logits_V
        seen = torch.tensor(sorted(set(text)))
        chosen = logits_V[seen]
        factor = self.repetition_penalty
        return logits_V.index_copy(
            0, seen, torch.where(chosen > 0, chosen / factor, chosen * factor)
        )
