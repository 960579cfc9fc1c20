"""The plan of a conversion, checked before anything is computed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from src.checkpoint.rebuild import kinds_of
from src.common.errors import InputError
from src.config.field_roles import switched_on
from src.conversion.latent import check_latent, full_kv_rank, stretched_theta
from src.conversion.upcycle import check_upcycle
from src.model.architecture import ModelParts
from src.model.attention import AttentionConfig
from src.model.attention.gqa import GQAConfig
from src.model.attention.mlha import MLHAConfig
from src.model.ffn import FeedForwardConfig
from src.model.ffn.moe import MoEConfig
from src.model.ffn.router import RouterConfig

LATENT = ("q_latent_dim", "kv_latent_dim", "rope_dim", "num_rope_keys", "rope_stride")
EXPERTS = ("num_routed", "num_shared", "top_k", "inner_dim")
DEFAULTS = {"num_routed": 7, "num_shared": 1, "top_k": 2, "rope_stride": 1}
"""Values for fields that are not typed: the write-up's experts, MHA2MLA's high frequencies."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts of a model before and after a conversion."""

    source: ModelParts
    target: ModelParts
    rope_stride: int

    @property
    def changes(self) -> bool:
        """Whether any part is converted."""
        return self.latent is not None or self.experts is not None

    @property
    def latent(self) -> tuple[GQAConfig, MLHAConfig] | None:
        """The attention before and after; None if it is not converted."""
        before, after = self.source.attention, self.target.attention
        if isinstance(before, GQAConfig) and isinstance(after, MLHAConfig):
            return before, after
        return None

    @property
    def experts(self) -> MoEConfig | None:
        """The new mixture of experts; None if there is none."""
        after = self.target.ffn
        is_new = after is not self.source.ffn
        return after if is_new and isinstance(after, MoEConfig) else None

    def attention_steps(self) -> Iterator[tuple[str, MLHAConfig]]:
        """The lossy steps one after the other, each with its name and the attention after it.

        Steps that change nothing are left out. The first one is `exact` if no rotated dimensions
        are given up.
        """
        if self.latent is None:
            return
        before, after = self.latent
        dims = self.source.model.dims()
        exact = replace(
            after,
            q_latent_dim=dims.hidden_dim,
            kv_latent_dim=full_kv_rank(before, rope_dim=after.rope_dim, dims=dims),
            num_rope_keys=before.num_kv_heads,
        )
        name = "partial rope" if after.rope_dim < before.rope_dim else "exact"
        steps = [(name, exact)]
        for name, field in (
            ("shared rope keys", "num_rope_keys"),
            ("kv latent", "kv_latent_dim"),
            ("query latent", "q_latent_dim"),
        ):
            following = replace(steps[-1][1], **{field: getattr(after, field)})
            if following != steps[-1][1]:
                steps.append((name, following))
        yield from steps


def plan(source: ModelParts, given: Mapping[str, Any], *, router: RouterConfig) -> Plan:
    """The plan for a source and the fields that the user typed.

    Args:
        source: configuration of the source's parts.
        given: attention and ffn, each an option's kind or None; and the fields of LATENT and
            EXPERTS, each an integer or None for the default.
        router: router of new experts; a run that starts from the result uses its own instead.

    Raises:
        InputError: the conversion is not possible.
    """
    stride = _or_default(given["rope_stride"], DEFAULTS["rope_stride"])
    attention = _attention(source, given, stride=stride)
    model = source.model
    if attention is not source.attention:
        theta = stretched_theta(
            model.rope_theta,
            source_dim=source.attention.rope_dim,
            rope_dim=attention.rope_dim,
            rope_stride=stride,
        )
        model = replace(model, rope_theta=theta)
    target = replace(source, model=model, attention=attention, ffn=_ffn(source, given, router))
    added = switched_on({"model": model, "attention": source.attention, "ffn": source.ffn})
    if added is not None and target != source:
        raise InputError(f"source: has {added}, which a converted layer cannot have")
    return Plan(source=source, target=target, rope_stride=stride)


def _attention(source: ModelParts, given: Mapping[str, Any], *, stride: int) -> AttentionConfig:
    before, wanted = source.attention, given["attention"]
    kind = kinds_of(before, source.ffn)["attention"]
    _check_kind("attention", wanted, kind, to="mlha")
    if wanted is None or wanted == kind:
        _check_unused(given, LATENT, "attention=mlha from a source with attention=gqa")
        return before
    assert isinstance(before, GQAConfig)
    dims = source.model.dims()
    rope_dim = _or_default(given["rope_dim"], before.rope_dim)
    full = full_kv_rank(before, rope_dim=min(rope_dim, dims.head_dim), dims=dims)
    try:
        target = MLHAConfig(
            q_latent_dim=_or_default(given["q_latent_dim"], dims.hidden_dim),
            kv_latent_dim=_or_default(given["kv_latent_dim"], full),
            rope_dim=rope_dim,
            num_rope_keys=_or_default(given["num_rope_keys"], before.num_kv_heads),
            latent_norm=False,
            qk_norm=False,
        )
        check_latent(before, target, dims, rope_stride=stride)
    except ValueError as error:
        raise InputError(str(error)) from error
    return target


def _ffn(source: ModelParts, given: Mapping[str, Any], router: RouterConfig) -> FeedForwardConfig:
    before, wanted = source.ffn, given["ffn"]
    kind = kinds_of(source.attention, before)["ffn"]
    _check_kind("ffn", wanted, kind, to="moe")
    if wanted is None or wanted == kind:
        _check_unused(given, EXPERTS, "ffn=moe from a source with ffn=mlp")
        return before
    try:
        target = MoEConfig(
            num_routed=_or_default(given["num_routed"], DEFAULTS["num_routed"]),
            num_shared=_or_default(given["num_shared"], DEFAULTS["num_shared"]),
            top_k=_or_default(given["top_k"], DEFAULTS["top_k"]),
            inner_dim=_or_default(given["inner_dim"], before.inner_dim),
            dispatch="grouped",
            router=router,
        )
        check_upcycle(target, dense_dim=before.inner_dim)
    except ValueError as error:
        raise InputError(str(error)) from error
    return target


def _check_kind(field: str, wanted: str | None, kind: str, *, to: str) -> None:
    if wanted not in (None, kind, to):
        raise InputError(
            f"{field}={wanted}: the source has {field}={kind};"
            f" must be {' or '.join(sorted({kind, to}))}"
        )


def _check_unused(given: Mapping[str, Any], fields: tuple[str, ...], where: str) -> None:
    for field in fields:
        if given[field] is not None:
            raise InputError(f"{field}={given[field]}: needs {where}; leave {field} out")


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value
