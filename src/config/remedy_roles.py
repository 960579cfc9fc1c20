"""The roles of a run's remedies: what a report must know of them without knowing their names."""

from collections.abc import Iterable, Mapping
from typing import Any

AA_CONTROL = "aa_control"
POSITIVE_CONTROL = "positive_control"

Roles = Mapping[str, Mapping[str, Any]]
"""By name of the remedy: role, evaluated_as, ends_early, keeps_average; see RemedyConfig."""


def roles_of(record: Mapping[str, Any], remedies: Iterable[str]) -> Roles:
    """The roles that a run recorded.

    Args:
        record: record.json's content. An early version recorded no roles: its remedies have the
            roles that they have in this code.
        remedies: the names of the run's remedies.
    """
    recorded: Roles | None = record.get("roles")
    if recorded is not None:
        return recorded
    # Imported here, because reading a run that recorded its roles needs no torch.
    from src.stability import REMEDIES, RemedyConfig

    return {name: REMEDIES.get(name, RemedyConfig).roles() for name in remedies}


def loss_metric(roles: Roles) -> str:
    """The validation loss by which a run is judged: of averaged weights where a remedy says so."""
    weights = [str(role["evaluated_as"]) for role in roles.values() if role["evaluated_as"]]
    return f"val_{weights[0]}/loss" if weights else "val/loss"


def all_have(roles: Roles, role: str) -> bool:
    """Whether a run has remedies, and all of them this role."""
    return bool(roles) and all(each["role"] == role for each in roles.values())
