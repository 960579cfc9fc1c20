"""What validation counts where a part of the text has no finite loss."""

import numpy as np
import pytest
import torch
from torch import nn

from src.training.validation import Validation
from tests.builders import VOCAB
from tests.training.harness import Harness, recipe_config

BAD = VOCAB - 1


class NanFromABadToken(nn.Module):
    """Logits of a bigram model, NaN from the first bad token of a window on, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Embedding(VOCAB, VOCAB)

    def forward(self, ids_BT):
        bad_BT = torch.where(ids_BT == BAD, torch.nan, 0.0).cumsum(dim=1)
        return self.logits(ids_BT) + bad_BT.unsqueeze(-1)


def validated(windows, batch_size):
    inputs = torch.tensor(windows)
    batches = [(part, torch.zeros_like(part)) for part in inputs.split(batch_size)]
    validation = Validation(
        batches, at_steps={1}, for_others=set(), token_bytes=np.zeros(VOCAB, dtype=np.int64)
    )
    recipe = recipe_config(max_steps=1)
    Harness(recipe=recipe, model=NanFromABadToken(), callbacks=[validation]).fit()
    return validation.last


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_tokens_from_the_first_nan_of_a_window_on_are_counted(batch_size):
    windows = [[0, 1, 2, 3], [0, 1, BAD, 3], [BAD, 1, 2, 3], [3, 2, 1, BAD]]
    found = validated(windows, batch_size)
    assert found["val/nonfinite_frac"] == 3 / 4
    assert found["val/nonfinite_tokens"] == (2 + 4 + 1) / 16


def test_where_all_is_finite_no_token_is_counted():
    found = validated([[0, 1, 2, 3]], 1)
    assert found["val/nonfinite_frac"] == found["val/nonfinite_tokens"] == 0
