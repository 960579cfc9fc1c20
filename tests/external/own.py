"""A module of the user's own, as the tests write it into their folder."""

OWN = """
import functools

import torch
from torch import nn

from own_decorator import timed


class Bigram(nn.Module):
    def __init__(self, vocab_size, shift=0, rows=None):
        super().__init__()
        self.table = nn.Embedding(rows or vocab_size, rows or vocab_size)
        self.shift = shift

    def forward(self, tokens):
        logits = self.table(tokens)
        return logits.roll(-self.shift, dims=1)


def raises(vocab_size):
    raise RuntimeError("no such thing\\nand more")


def number():
    return 3


class Pair(Bigram):
    def forward(self, tokens):
        return self.table(tokens), None


class Flat(Bigram):
    def forward(self, tokens):
        return self.table(tokens).flatten(0, 1)


def leaves(vocab_size):
    raise SystemExit


class LeavesLate(Bigram):
    def forward(self, tokens):
        raise SystemExit("no more")


class Whole(Bigram):
    def forward(self, tokens):
        return self.table(tokens).long()


class Detached(Bigram):
    def forward(self, tokens):
        return self.table(tokens).detach()


class OnlyInEvaluation(Bigram):
    def forward(self, tokens):
        if self.training:
            raise ValueError("not in training")
        return self.table(tokens)


def frozen(vocab_size):
    return Bigram(vocab_size).requires_grad_(False)


def double(vocab_size):
    return Bigram(vocab_size).double()


class Method(Bigram):
    # Gives what it is told to by one of the methods that a model may have.
    def __init__(self, vocab_size, method, gives):
        super().__init__(vocab_size)
        values = {
            "list": [1],
            "vector": {"balance": torch.ones(2)},
            "float": {"balance": 1.0},
            "ours": {"loss": torch.ones(())},
            "slash": {"a/b": torch.ones(())},
            "tensor": {"load": torch.ones(())},
            "fraction": 0.5,
            "all": sum(p.numel() for p in self.parameters()),
            "uneven": {"load": float("nan"), "count": 3},
        }
        setattr(self, method, lambda: values[gives])


class Finish(Bigram):
    def finish_step(self):
        pass


class FinishBatch(Bigram):
    def finish_batch(self, more):
        pass


class FinishRaises(Bigram):
    def finish_step(self, applied):
        raise OSError("disk full")


class OneRow(Bigram):
    def forward(self, tokens):
        assert len(tokens) == 1
        return self.table(tokens)


class Late(Bigram):
    # Makes a parameter when it runs first.
    def forward(self, tokens):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(1))
        return self.table(tokens) * self.scale


class Counts(Bigram):
    # The scale hangs on a step that no checkpoint knows.
    steps = 0

    def finish_step(self, applied):
        self.steps += 1


class NotANumber(Bigram):
    def forward(self, tokens):
        return self.table(tokens) * float("nan")


def meta(vocab_size):
    with torch.device("meta"):
        return Bigram(vocab_size)


class Chatty(Bigram):
    def forward(self, tokens):
        print("here I am")
        return super().forward(tokens)


class Factory:
    def __call__(self, vocab_size):
        return Bigram(vocab_size)


factory = Factory()
part = functools.partial(Bigram, shift=0)


@timed
def wrapped(vocab_size):
    return Bigram(vocab_size)
"""

DECORATOR = """
import functools


def timed(build):
    @functools.wraps(build)
    def inner(*args, **kwargs):
        return build(*args, **kwargs)

    return inner
"""


def own(name: str) -> list[str]:
    return ["model=external", f"model.target=own_model:{name}"]
