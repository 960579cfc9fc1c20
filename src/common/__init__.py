"""Ground floor: helpers that every package of `src` may import, and that import none of them."""
