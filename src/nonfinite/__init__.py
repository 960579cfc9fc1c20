"""Finds the operation that made a training step non-finite, in any PyTorch training loop.

    from nonfinite import watch
    watch(model, optimizer)

`audit(model, inputs)` says before any training what could go non-finite.

It needs torch alone. `nonfinite.lightning` and `nonfinite.transformers` hold callbacks; those for
Lightning can be imported from here too, and are loaded only then.
"""

from typing import Any

from nonfinite.expose_router import expose_router
from nonfinite.finding import Finding
from nonfinite.tracer import trace
from nonfinite.watch import watch
from nonfinite.watched_steps import Watch

__all__ = ["Finding", "Watch", "audit", "expose_router", "trace", "watch"]


def __getattr__(name: str) -> Any:
    """`audit`, or a callback of `nonfinite.lightning`; both are loaded when they are asked for."""
    if name == "audit":
        from nonfinite.auditing import audit

        return audit
    if not name.startswith("_"):
        from nonfinite import lightning

        if name in lightning.__all__:
            return getattr(lightning, name)
    raise AttributeError(f"module 'nonfinite' has no attribute {name!r}")
