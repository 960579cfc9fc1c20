"""Continues prompts, several at once, with a cache of what was read.

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
    """New tokens of every prompt.

    A prompt's text hangs on nothing but itself, the seed and the place in the list: others beside
    it, of any length, change no more than the rounding of its logits. A text that has filled the
    context goes on with the later half of it, read anew.

    Args:
        model: on any device; left in the mode it was in.
        prompts: token ids, at least one each, at most the context.
        max_new_tokens: of each.
        sampling: how a token is drawn.
        seed: of the draws, which are made on the CPU, so that they are the same on every device.
        vocab_size: of the tokenizer, where the model may have more words; no others are drawn.
        end_ids: tokens after which a text has ended.
        on_token: told the prompt's place and the token as soon as it is drawn, but for the one that
            ends the text.

    Returns:
        The new tokens alone; fewer where one of them ends the text, or where the logits stop being
        finite.

    Raises:
        ValueError: a prompt is empty or longer than the context.
    """
    for prompt in prompts:
        if not 1 <= len(prompt) <= model.max_seq_len:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens: must have 1 to {model.max_seq_len},"
                " the model's context"
            )
    draws = [generator(seed, "sample", place) for place in range(len(prompts))]
    texts = [list(prompt) for prompt in prompts]
    windows = [list(prompt) for prompt in prompts]
    going = [True] * len(prompts)
    was_training = model.training
    model.eval()
    logits_BV, cache = _read(model, windows, more=max_new_tokens)
    for number in range(max_new_tokens):
        for place, window in enumerate(windows):
            going[place] = going[place] and bool(logits_BV[place].isfinite().all())
            if not going[place]:
                # It has ended, and stays beside the others with its last token again.
                window.append(window[-1])
                continue
            logits_V = logits_BV[place, :vocab_size]
            token = sampling.pick(logits_V, texts[place], draws[place])
            texts[place].append(token)
            window.append(token)
            going[place] = token not in end_ids
            if going[place] and on_token is not None:
                on_token(place, token)
        more = max_new_tokens - number - 1
        if not any(going) or not more:
            break
        if any(len(window) > model.max_seq_len for window in windows):
            windows = [_shortened(window, model.max_seq_len) for window in windows]
            logits_BV, cache = _read(model, windows, more=more)
        else:
            latest_B1 = torch.tensor([[window[-1]] for window in windows])
            logits_BV = _logits(model, latest_B1, cache)
    model.train(was_training)
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def shown(new: Sequence[int], end_ids: Collection[int]) -> list[int]:
    """New tokens without the one that ended the text."""
    return list(new[:-1] if new and new[-1] in end_ids else new)


def _shortened(window: list[int], context: int) -> list[int]:
    return window if len(window) <= context else window[-(context // 2 or 1) :]


def _read(model: Transformer, windows: Sequence[list[int]], *, more: int) -> tuple[Tensor, Cache]:
    """Logits after each window, and the cache that goes on from there."""
    longest = max(map(len, windows))
    padding = [longest - len(window) for window in windows]
    num_slots = min(longest + more, model.max_seq_len)
    cache = model.new_cache(num_padding=padding, num_slots=num_slots)
    rows = [
        [window[0]] * missing + window for window, missing in zip(windows, padding, strict=True)
    ]
    return _logits(model, torch.tensor(rows), cache), cache


def _logits(model: Transformer, tokens_BT: Tensor, cache: Cache) -> Tensor:
    """After the last token, (B, V), float32 on the CPU."""
    device = model.embedding.weight.device
    return model.extend(tokens_BT.to(device), cache)[:, -1].float().cpu()
