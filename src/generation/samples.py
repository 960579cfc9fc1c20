"""Text samples that a run writes at its end, to show what its loss means."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from src.common.errors import InputError
from src.data.tokenizer import Tokenizer
from src.generation.decode import continue_prompts, without_end
from src.generation.prompts import WRITEUP
from src.generation.sampling import Sampling
from src.model import Transformer

NUM_TOKENS = 120
FENCE = "~" * 12
"""Delimiter of a text; too long for a model to generate by chance."""
SAMPLING = Sampling(temperature=0.8, top_p=None, top_k=None, repetition_penalty=1.0)


def samples_markdown(
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    weights: Mapping[str, Callable[[], AbstractContextManager[None]]],
    seed: int,
) -> str:
    """Continuations of the write-up's prompts, as Markdown.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        weights: contexts inside which the model holds certain weights, by name.
        seed: seed of the draws.
    """
    lines = [f"# Samples: {NUM_TOKENS} tokens at temperature {SAMPLING.temperature}, seed {seed}"]
    for name, context in weights.items():
        lines += ["", f"## {name} weights"]
        with context():
            found = _continued(model, tokenizer, seed=seed)
        for prompt, text in zip(WRITEUP, found, strict=True):
            lines += ["", f"### {prompt}", "", FENCE, text, FENCE]
    return "\n".join([*lines, ""])


def first_sample(markdown: str) -> str:
    """The first sample in the output of `samples_markdown`."""
    _, _, rest = markdown.partition(f"{FENCE}\n")
    return rest.partition(FENCE)[0].strip()


def _continued(model: Transformer, tokenizer: Tokenizer, *, seed: int) -> list[str]:
    prompts: list[list[int]] = []
    places: dict[int, int] = {}
    texts = []
    for place, prompt in enumerate(WRITEUP):
        try:
            ids = [int(token) for token in tokenizer.encode(prompt)]
        except InputError as error:
            texts.append(f"({error})")
            continue
        texts.append("")
        places[place] = len(prompts)
        prompts.append(ids)
    if not prompts:
        return texts
    context = model.max_seq_len
    new = continue_prompts(
        model,
        [ids[-context:] for ids in prompts],
        max_new_tokens=NUM_TOKENS,
        sampling=SAMPLING,
        seed=seed,
        vocab_size=tokenizer.vocab_size,
        end_ids=tokenizer.end_ids,
    )
    for place, number in places.items():
        texts[place] = tokenizer.decode(
            prompts[number] + without_end(new[number], tokenizer.end_ids)
        )
    return texts
