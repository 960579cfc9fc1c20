"""Sampling by full forward passes.

Axes: T time, V vocabulary.
"""

import torch

from src.model import Transformer


@torch.no_grad()
def sample(
    model: Transformer,
    prompt: list[int],
    *,
    num_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """Continues a prompt; the model sees at most its context, the latest tokens.

    Args:
        model: on any device; left in the mode it was in.
        prompt: token ids, at least one.
        num_tokens: tokens to add.
        temperature: divides the logits; above 0.
        generator: on the CPU, so that a seed gives one text on every device.

    Returns:
        The new token ids alone; fewer where the logits stop being finite.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    ids = list(prompt)
    for _ in range(num_tokens):
        context_1T = torch.tensor([ids[-model.max_seq_len :]], device=device)
        logits_V = model(context_1T)[0, -1].float().cpu()
        if not logits_V.isfinite().all():
            break
        probabilities_V = (logits_V / temperature).softmax(dim=-1)
        ids.append(int(torch.multinomial(probabilities_V, 1, generator=generator)))
    model.train(was_training)
    return ids[len(prompt) :]
