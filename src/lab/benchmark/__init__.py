"""How fast a step is, beside a floor and beside others."""
