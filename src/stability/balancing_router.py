"""The check of remedies that change how a router's balancing bias is updated."""

from collections.abc import Mapping
from typing import Any

from src.common.errors import InputError


def check_balancing_bias(remedy: str, parts: Mapping[str, Any]) -> None:
    """Raises InputError unless the router balances its load by a bias."""
    balance = parts["ffn"].router.balance
    if balance != "bias":
        raise InputError(
            f"ffn.router.balance={balance}: stability={remedy} needs ffn.router.balance=bias"
        )
