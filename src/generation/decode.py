"""Continues several prompts at once, with a cache.

Axes: B prompts, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from src.common.random_streams import generator
from src.generation.sampling import Sampling
from src.model import Transformer
from src.model.cache import Cache


@torch.inference_mode()
def continue_prompts(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    vocab_size: int | None = None,
    end_ids: Collection[int] = (),
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """Generates new tokens for each prompt.

    A continuation depends only on the prompt, its index in the list, and the seed; other prompts in
    the batch change only the rounding of its logits. When a text fills the context, generation
    continues from the later half of it.

    Args:
        model: the model, on any device; its mode is restored afterwards.
        prompts: token ids of each prompt, from one token up to the context.
        max_new_tokens: number of tokens to generate for each prompt.
        sampling: how a token is drawn.
        seed: seed of the draws, which are made on the CPU to be the same for every device.
        vocab_size: the tokenizer's vocabulary size, if the model's may be larger.
        end_ids: ids of tokens that end a text.
        on_token: called with a prompt's index and each new token, except one that ends the text.

    Returns:
        The new tokens of each prompt; fewer than max_new_tokens if one of them ends the text, or if
        the logits become non-finite.

    Raises:
        ValueError: a prompt is empty or longer than the context.
    """
    for prompt in prompts:
        if not 1 <= len(prompt) <= model.max_seq_len:
            raise ValueError(
                f"a prompt has {len(prompt)} tokens; must have 1 to {model.max_seq_len},"
                " the model's context"
            )
    draws = [generator(seed, "sample", place) for place in range(len(prompts))]
    texts = [list(prompt) for prompt in prompts]
    windows = [list(prompt) for prompt in prompts]
    is_active = [True] * len(prompts)
    was_training = model.training
    model.eval()
    logits_BV, cache = _fill_cache(model, windows, more=max_new_tokens)
    for number in range(max_new_tokens):
        for place, window in enumerate(windows):
            is_active[place] = is_active[place] and bool(logits_BV[place].isfinite().all())
            if not is_active[place]:
                # This text has ended; repeating its last token keeps the batch rectangular.
                window.append(window[-1])
                continue
            logits_V = logits_BV[place, :vocab_size]
            token = sampling.pick(logits_V, texts[place], draws[place])
            texts[place].append(token)
            window.append(token)
            is_active[place] = token not in end_ids
            if is_active[place] and on_token is not None:
                on_token(place, token)
        more = max_new_tokens - number - 1
        if not any(is_active) or not more:
            break
        if any(len(window) > model.max_seq_len for window in windows):
            windows = [_later_half(window, model.max_seq_len) for window in windows]
            logits_BV, cache = _fill_cache(model, windows, more=more)
        else:
            latest_B1 = torch.tensor([[window[-1]] for window in windows])
            logits_BV = _logits(model, latest_B1, cache)
    model.train(was_training)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def without_end(new: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """New tokens without the one that ended the text."""
    return list(new[:-1] if new and new[-1] in end_ids else new)


def _later_half(window: list[int], context: int) -> list[int]:
    return window if len(window) <= context else window[-(context // 2 or 1) :]


def _fill_cache(
    model: Transformer, windows: Sequence[list[int]], *, more: int
) -> tuple[Tensor, Cache]:
    """Logits (B, V) after each window, and a cache that holds the windows."""
    longest = max(map(len, windows))
    padding = [longest - len(window) for window in windows]
    num_slots = min(longest + more, model.max_seq_len)
    cache = model.new_cache(num_padding=padding, num_slots=num_slots)
    rows = [
        [window[0]] * missing + window for window, missing in zip(windows, padding, strict=True)
    ]
    return _logits(model, torch.tensor(rows), cache), cache


def _logits(model: Transformer, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """Logits of the last token, (B, V), in float32 on the CPU."""
    device = model.embedding.weight.device
    return model.extend(tokens_BT.to(device), cache)[:, -1].float().cpu()
