"""SmolDeepSeek Ablations: a training-stability laboratory for small language models."""
