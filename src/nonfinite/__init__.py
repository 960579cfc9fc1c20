"""Finds the operation that made a training step non-finite, in any PyTorch training loop.

    from nonfinite import watch
    watch(model, optimizer)

It needs torch alone. `nonfinite.lightning` and `nonfinite.transformers` hold the same as callbacks.
"""

from nonfinite.expose_router import expose_router
from nonfinite.finding import Finding
from nonfinite.tracer import trace
from nonfinite.watch import Watch, watch

__all__ = ["Finding", "Watch", "expose_router", "trace", "watch"]
