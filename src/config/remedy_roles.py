"""The roles of a run's remedies: what a report needs to know to judge a remedy it does not know."""

from collections.abc import Iterable, Mapping
from typing import Any

AA_CONTROL = "aa_control"
POSITIVE_CONTROL = "positive_control"

Roles = Mapping[str, Mapping[str, Any]]
"""By remedy: role, evaluated_as, ends_early and keeps_average, as RemedyConfig defines them."""


def roles_of(record: Mapping[str, Any], remedies: Iterable[str]) -> Roles:
    """The roles that a run recorded.

    Args:
        record: record.json's content. Early versions recorded no roles; their remedies get the
            roles that they have in the current code.
        remedies: the names of the run's remedies.
    """
    recorded: Roles | None = record.get("roles")
    if recorded is not None:
        return recorded
    # Imported here, so that reading a run that recorded its roles does not import torch.
    from src.stability import REMEDIES, RemedyConfig

    return {name: REMEDIES.get(name, RemedyConfig).roles() for name in remedies}


def loss_metric(roles: Roles) -> str:
    """The validation loss by which a run is judged: `evaluated_as` of a remedy, if it has one."""
    weights = [str(role["evaluated_as"]) for role in roles.values() if role["evaluated_as"]]
    return f"val_{weights[0]}/loss" if weights else "val/loss"


def all_have(roles: Roles, role: str) -> bool:
    """Whether a run has remedies and all of them have this role."""
    return bool(roles) and all(each["role"] == role for each in roles.values())
