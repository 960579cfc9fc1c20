"""What a run is and where it will be, before PyTorch is imported.

`src.config.compose` finds the same with the schema, which needs the parts themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from src.common.override_grammar import parse
from src.common.run_folder import check_study
from src.config.field_names import external_parts, stand_in_for_schema
from src.config.hydra_compose import choices_of, composed_config
from src.config.own_options import fields_set_by_own_remedies
from src.config.variant_name import Variant, run_folder, variant_name, variant_of

FROM_SAVED = ("init", "fork")
"""Fields that name a saved model or state, which may choose options; only PyTorch can read it."""


@dataclass(frozen=True, kw_only=True)
class EarlyName:
    """What can be said of a run before it is checked."""

    variant: Variant
    target: str | None
    """model.target of an external model; None for other models."""
    max_steps: int
    """Optimizer steps of the run."""
    folder: Path
    """The run folder."""


def name_before_torch(config_name: str, arguments: Sequence[str]) -> EarlyName | None:
    """Names a run; None if it starts from a saved model.

    Args:
        config_name: the command's file in conf/.
        arguments: those of one run, whose names and numbers have been checked.

    Raises:
        InputError: the study has no valid name.
        Exceptions of Hydra and OmegaConf, which `readable` turns into one line.
    """
    typed = parse(arguments)
    if any(override.key in FROM_SAVED and override.text != "null" for override in typed):
        return None
    stand_in_for_schema()
    selecting = [*external_parts(typed), *arguments]
    composed = composed_config(config_name, selecting)
    choices = choices_of(composed)
    remedies = [
        name for name, fields in (composed.get("stability") or {}).items() if fields is not None
    ]
    variant = variant_of(choices, remedies)
    named = [*fields_set_by_own_remedies(config_name, selecting, composed), *typed]
    check_study(str(composed.study))
    return EarlyName(
        variant=variant,
        target=composed.model.get("target"),
        max_steps=int(composed.recipe.max_steps),
        folder=run_folder(
            str(composed.paths.runs),
            str(composed.study),
            variant_name(variant, choices, named),
            seed=int(composed.seed),
            repeat=int(composed.repeat),
        ),
    )
