"""The recipe's fields: optimizer, schedule, batch, precision, validation and logging."""

import math
from dataclasses import dataclass

from src.training.schedule import SCHEDULES

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
MATMUL_PRECISIONS = ("highest", "high", "medium")


MAX_STEPS, MAX_COUNT = 10**9, 10**6
"""Limits above any real run: of optimizer steps, and of all other counts in the recipe."""

VAL_TOKENS = 4096
"""Tokens of a validation batch, if a training batch has fewer."""


@dataclass(kw_only=True)
class RecipeConfig:
    """How a model is trained."""

    max_steps: int
    """Optimizer steps of the run, including skipped ones."""
    batch_size: int
    """Rows of a micro-batch, over all devices."""
    seq_len: int
    """Tokens of a row, and the model's context."""
    accumulate: int
    """Micro-batches whose gradients are accumulated for one optimizer step."""
    learning_rate: float
    """Peak learning rate; at least 0."""
    betas: list[float]
    """AdamW's betas; each at least 0 and below 1."""
    eps: float
    """AdamW's epsilon; above 0."""
    weight_decay: float
    """AdamW's decoupled weight decay; at least 0."""
    decay_params: str
    """all: every parameter decays, as in the write-up; matrices: norm gains and biases do not."""
    fused: bool
    """Use PyTorch's fused AdamW kernel, which is faster and differs in the last bit."""
    warmup_frac: float
    """Share of the run in which the learning rate rises linearly from 0; at least 0, below 1."""
    schedule: str
    """Shape of the learning rate after warm-up: constant, linear, cosine or wsd."""
    precision: str
    """32-true, bf16-mixed (float32 weights, bfloat16 matrix products), or bf16-true (weights,
    gradients and moments in bfloat16 too)."""
    matmul_precision: str
    """PyTorch's float32 matmul precision: highest, high or medium."""
    clip_norm: float | None
    """Largest norm of the gradient; null: no clipping."""
    z_loss_weight: float
    """Weight of the z-loss on the output logits (arXiv 2204.02311, section 5); 0: none."""
    num_validations: int
    """Number of validations, at equal distances; the last is at the end."""
    val_windows: int | None
    """Windows of seq_len tokens in each validation; null: all."""
    log_every: int
    """Optimizer steps between logged lines."""
    checkpoint_every: int | None
    """Optimizer steps between saves, besides those after validations; null: none."""

    def __post_init__(self) -> None:
        positive = "max_steps", "batch_size", "seq_len", "accumulate", "num_validations"
        for field in (*positive, "log_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 1")
        for field in ("batch_size", "seq_len", "accumulate", "num_validations", "max_steps"):
            most = MAX_STEPS if field == "max_steps" else MAX_COUNT
            if getattr(self, field) > most:
                raise ValueError(f"{field}={getattr(self, field)}: must be at most {most:,}")
        for field in ("val_windows", "checkpoint_every"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1, or null")
        for field in ("learning_rate", "weight_decay", "z_loss_weight"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field}={getattr(self, field)}: must be at least 0 and finite")
        if not 0 < self.eps < 1:
            raise ValueError(f"eps={self.eps}: must be between 0 and 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}: must be two numbers from 0 to below 1")
        if not 0 <= self.warmup_frac < 1:
            raise ValueError(
                f"warmup_frac={self.warmup_frac}: must be at least 0 and below 1"
                " (warm-up cannot be longer than the run)"
            )
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm={self.clip_norm}: must be above 0, or null for none")
        for field, allowed in (
            ("decay_params", ("all", "matrices")),
            ("schedule", tuple(SCHEDULES)),
            ("precision", PRECISIONS),
            ("matmul_precision", MATMUL_PRECISIONS),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field}={getattr(self, field)}: must be one of {', '.join(allowed)}"
                )

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps of the warm-up."""
        return round(self.warmup_frac * self.max_steps)

    def lr_factor(self, step: int) -> float:
        """Factor on learning_rate for the optimizer step that follows `step` others."""
        schedule = SCHEDULES[self.schedule]
        return schedule(step, warmup_steps=self.warmup_steps, max_steps=self.max_steps)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, over all its micro-batches."""
        return self.batch_size * self.seq_len * self.accumulate

    @property
    def val_rows(self) -> int:
        """Rows of a validation batch."""
        # Validation holds no gradients, so larger batches fit; small ones would be slow.
        return max(self.batch_size, VAL_TOKENS // self.seq_len)

    def validation_steps(self) -> set[int]:
        """Numbers of the steps after which validation runs; fewer than asked for in a short run."""
        parts = range(1, self.num_validations + 1)
        return {max(1, round(k * self.max_steps / self.num_validations)) for k in parts}
