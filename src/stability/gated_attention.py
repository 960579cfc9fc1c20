"""A gate on the output of each attention head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from src.stability.base import RemedyConfig, RunFacts
from src.stability.part_stats import PartStats

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True)
class GatedAttentionConfig(RemedyConfig):
    """Gates each head's output by a sigmoid (arXiv 2505.06708, eq. 5, position G1).

    y <- y * sigmoid(x W_g), where y is what a head has attended to, x the normalised input of the
    layer, and the product elementwise: each head has gates of its own, one for each dimension. The
    output projection follows. Qwen3-Next and Trinity have this form; the paper's form with one gate
    a head is not offered.

    The gate adds hidden_dim * num_heads * head_dim parameters a layer, so that the arm is larger
    than its baseline. All other weights start as the baseline's. W_g is drawn like other weights,
    so that gates begin near 0.5 and halve the outputs; the paper does not correct for this, nor is
    it corrected here. Departure: in its dense models the paper narrows the feed-forward part by as
    many parameters, here the model grows.

    Logs the mean gate of the step (`mean`, over all layers): 0.5 is the start, 1 is no gate.
    """

    def config_overrides(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.gated": True}

    def callbacks(self, run: RunFacts) -> list[pl.Callback]:
        place = ".attention.gate_proj"
        return [PartStats("gated_attention", place, run, reduce="mean")]
