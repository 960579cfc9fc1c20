"""A module of the user's own, as the tests write it into their folder."""

OWN = """
import functools
import random
from types import SimpleNamespace

import numpy
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


class InFloat32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x @ weight).bfloat16() if torch.is_autocast_enabled("cpu") else x @ weight

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient @ weight.mT, None


class OnlyInFloat32(Bigram):
    # Its backward pass expects a gradient in float32.
    def forward(self, tokens):
        logits = super().forward(tokens)
        return InFloat32.apply(logits, torch.eye(logits.shape[-1]))


class HasLogits(Bigram):
    # As models of transformers do.
    def forward(self, tokens):
        return SimpleNamespace(logits=super().forward(tokens), loss=None)


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


class Remembers(Bigram):
    # In all that no checkpoint holds, beside what each pass writes anew.
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.register_buffer("mean", torch.zeros(1), persistent=False)
        self.register_buffer("mask", torch.ones(1, 1), persistent=False)
        self.last, self.tensor = None, torch.zeros(1)
        self.seen, self.by_name = [], {"inner": {"steps": 0}}

    def forward(self, tokens):
        logits = self.table(tokens)
        self.last = [logits.detach()]
        self.mask = torch.ones(tokens.shape[1], tokens.shape[1])
        if self.training:
            self.mean.add_(logits.detach().abs().mean())
            self.tensor += 1
            self.seen.append(1)
            self.by_name["inner"]["steps"] += 1
        return logits


class Draws(Bigram):
    # From every generator there is.
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        with torch.no_grad():
            self.table.weight.add_(random.random() + numpy.random.rand())

    def forward(self, tokens):
        logits = self.table(tokens)
        if self.training:
            logits = logits * (random.random() + numpy.random.rand() + torch.rand(()))
        return logits


class Grows(Bigram):
    # A mask that becomes as large as the longest row so far.
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.register_buffer("mask", torch.ones(1, 1), persistent=False)
        self.register_buffer("scratch", torch.zeros(0), persistent=False)
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("places", torch.arange(8).expand(4, -1), persistent=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        if len(self.mask) < length:
            self.mask = torch.ones(length, length).tril()
        mask = self.mask[:length, :length]
        x = self.table(tokens)
        self.scratch, self.cache = x.detach(), None
        return (mask / mask.sum(-1, keepdim=True)) @ x


class Masked(Bigram):
    # By a parameter that is not trained.
    def __init__(self, vocab_size, max_seq_len):
        super().__init__(vocab_size)
        mask = torch.full((max_seq_len, max_seq_len), -torch.inf).triu(1)
        self.mask = nn.Parameter(mask, requires_grad=False)

    def forward(self, tokens):
        length = tokens.shape[1]
        return self.mask[:length, :length].softmax(-1) @ self.table(tokens)


class Divides(Bigram):
    # By 0, in the third step.
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.register_buffer("step", torch.zeros(()))

    def finish_step(self, applied):
        self.step += 1

    def forward(self, tokens):
        logits = self.table(tokens)
        return logits / (self.step != 2) if self.training else logits


def compiled(vocab_size):
    return torch.compile(Divides(vocab_size), backend="eager")


class Expanded(Bigram):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.register_buffer("places", torch.arange(8).expand(4, -1))


class Sparse(Bigram):
    def __init__(self, vocab_size):
        super().__init__(vocab_size)
        self.table = nn.Embedding(vocab_size, vocab_size, sparse=True)


def scripted(vocab_size):
    return torch.jit.trace(Bigram(vocab_size), torch.zeros(1, 2, dtype=torch.long))


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
