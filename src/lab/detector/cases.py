"""The runs of the detector benchmark: the planted fault, and the right answer."""

import re
from dataclasses import dataclass

STEPS = 130
"""Optimizer steps of every run, which takes seconds."""

FAULTS = "src.lab.detector.faults:build"

QUICK = (
    f"recipe.max_steps={STEPS}",
    "recipe.precision=32-true",
    "recipe.num_validations=1",
    "recipe.val_windows=16",
    "recipe.log_every=2",
    "watch.gradients_every=2",
    "watch.activations_every=2",
    "watch.routers_every=2",
    "tracking=local",
)
"""Arguments of all runs: small models, and frequent measurements."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of run, trained over several seeds."""

    name: str
    arguments: tuple[str, ...]
    """Arguments besides QUICK, seed and study."""
    kind: str
    """drift: fails after a drift towards a limit; sudden: fails in one step; healthy: never."""
    place: str = ""
    """A regular expression for the `<module>: <operation>` that an incident should name."""
    cause: str = ""
    """The cause that an incident should name."""

    @property
    def slug(self) -> str:
        """The name in a form for paths."""
        return re.sub(r"[^a-z0-9.]+", "_", self.name.lower()).strip("_")

    @property
    def is_planted(self) -> bool:
        """Whether the fault is built into the model and grows at a prescribed rate."""
        return f"model.target={FAULTS}" in self.arguments

    @property
    def float_max(self) -> float | None:
        """Largest finite number for early warnings; None: float32's."""
        typed = dict(argument.partition("=")[::2] for argument in self.arguments)
        return float(typed["watch.float_max"]) if "watch.float_max" in typed else None


def _planted(fault: str, *more: str) -> tuple[str, ...]:
    return (
        "preset=smoke",
        "model=external",
        f"model.target={FAULTS}",
        f"model.kwargs={{fault:{fault},steps:{STEPS}}}",
        "recipe.seq_len=32",
        *more,
    )


def _built_in(*more: str) -> tuple[str, ...]:
    return ("preset=stress", *more)


def _example(target: str, *more: str) -> tuple[str, ...]:
    return (
        "preset=smoke",
        "model=external",
        f"model.target=src.examples.{target}",
        "recipe.seq_len=32",
        *more,
    )


LLAMA = r"model\.model\.model\.layers"

CASES = (
    Case(
        name="published gate",
        arguments=("preset=crash", "ffn=moe_writeup"),
        kind="drift",
        place=r"model\.layers\.\d\.ffn\.router: ",
        cause="router underflow",
    ),
    Case(
        name="additive gate",
        arguments=("preset=crash", "ffn=moe_writeup_add"),
        kind="drift",
        place=r"model\.layers\.\d\.ffn\.router: ",
        cause="router underflow",
    ),
    Case(
        name="exploding rate",
        arguments=_built_in(
            "attention=gqa", "ffn=mlp", "recipe.learning_rate=2.1", "recipe.weight_decay=1"
        ),
        kind="drift",
        cause="exploding gradient",
    ),
    Case(
        name="attention growth",
        arguments=_planted("attention_growth"),
        kind="drift",
        place=LLAMA + r"\.1\.self_attn: .*scaled_dot_product_attention",
        cause="attention overflow",
    ),
    Case(
        name="output divergence",
        arguments=_planted("output_growth"),
        kind="drift",
        place=r": .*mean",
        cause="output divergence",
    ),
    Case(
        name="float16 overflow",
        arguments=_planted("float16_overflow", "watch.float_max=65504"),
        kind="drift",
        place=LLAMA + r"\.1\.mlp\.down_proj: .*half",
        cause="float16 overflow",
    ),
    Case(
        name="gradient growth",
        arguments=_planted("gradient_growth"),
        kind="drift",
        place=LLAMA + r"\.0\.mlp\.up_proj: norm of the gradient of weight",
        cause="exploding gradient",
    ),
    Case(
        name="Inf in a gradient",
        arguments=_planted("infinite_gradient"),
        kind="sudden",
        place=LLAMA + r"\.1\.self_attn\.k_proj: ",
        cause="bad gradient",
    ),
    Case(
        name="NaN in a weight",
        arguments=_planted("nan_weight"),
        kind="sudden",
        place=LLAMA + r"\.0\.self_attn\.o_proj: weight",
        cause="non-finite weights",
    ),
    Case(
        name="bad batch",
        arguments=_planted("masked_row"),
        kind="sudden",
        place=LLAMA + r"\.0\.self_attn: .*softmax",
        cause="fully masked row",
    ),
    Case(name="mlha + moe", arguments=_built_in(), kind="healthy"),
    Case(name="mlha + mlp", arguments=_built_in("ffn=mlp"), kind="healthy"),
    Case(name="gqa + moe", arguments=_built_in("attention=gqa"), kind="healthy"),
    Case(name="gqa + mlp", arguments=_built_in("attention=gqa", "ffn=mlp"), kind="healthy"),
    Case(
        name="mlha + moe, rate 0.03",
        arguments=_built_in("recipe.learning_rate=0.03"),
        kind="healthy",
    ),
    Case(
        name="mlha + moe, bias rate 0.1",
        arguments=_built_in("ffn.router.bias_rate=0.1"),
        kind="healthy",
    ),
    Case(name="an MLP", arguments=_example("mlp:MLPLanguageModel"), kind="healthy"),
    Case(name="a Llama", arguments=_example("llama:build"), kind="healthy"),
    Case(name="a Mixtral", arguments=_example("mixtral:build"), kind="healthy"),
    Case(
        name="a Llama, float16", arguments=_planted("none", "watch.float_max=65504"), kind="healthy"
    ),
)
