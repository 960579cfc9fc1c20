"""Plans a sweep: which runs a command line with several values stands for, and in which order."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override as HydraOverride

from src.cli import command_line
from src.cli.hydra_errors import readable
from src.common.errors import InputError
from src.common.override_grammar import parse
from src.common.tracking_address import default_uri
from src.config.field_roles import role_of
from src.config.fork import Fork
from src.config.run_config import RunConfig
from src.config.schema import CONF
from src.run import start_fork
from src.stability import RemedyConfig
from src.sweep.cluster import LAUNCHER, check_cluster
from src.sweep.composer import Composer
from src.sweep.settings import SweepSettings, compose_settings


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    config: RunConfig
    arguments: list[str]
    """The arguments of src.train."""
    baseline: str | None
    """The name of the variant that the run is compared with; None for a baseline."""
    added: bool
    """Whether the sweep added the run as the baseline of another."""
    start: Fork | None = None
    """The saved state of the baseline that the run can start from."""
    observe: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Observers that the run carries for its branches, with their fields."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.folder

    def key(self, step: int) -> str:
        """The key that the state saved after a step must have."""
        return start_fork.state_key(self.config.config_hash(), self.observe, step)

    @property
    def first_step(self) -> int:
        """Number of steps that come from a saved state: the baseline's, or that of a typed fork."""
        origin = self.start or self.config.fork
        return 0 if origin is None else origin.step

    @property
    def own_steps(self) -> int:
        """Number of steps that the run trains itself."""
        return self.config.last_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked sweep."""

    study: str
    sweep_id: str
    settings: SweepSettings
    rerun: bool
    cells: list[Cell]
    """The runs in the order of the sweep, each baseline before the runs compared with it."""
    dropped: list[str]
    """Names of runs that were left out because they would repeat another bit by bit."""

    @property
    def folder(self) -> Path:
        """runs/<study>."""
        return Path(self.cells[0].config.paths.runs) / self.study

    def without_missing_states(self, finished: Mapping[Path, bool]) -> "Plan":
        """The plan in which runs start from step 0 if their start state will not exist.

        That is the case if the baseline has finished without saving the right state.
        """
        by_folder = {cell.folder: cell for cell in self.cells}

        def will_exist(start: Fork) -> bool:
            needed = by_folder[start.source].key(start.step)
            return not finished[start.source] or start.key == needed

        cells = [
            cell
            if cell.start is None or will_exist(cell.start)
            else dataclasses.replace(cell, start=None)
            for cell in self.cells
        ]
        return dataclasses.replace(self, cells=cells)

    def waves(self) -> list[list[Cell]]:
        """The runs that others start from, then all other runs."""
        sources = {cell.start.source for cell in self.cells if cell.start is not None}
        first = [cell for cell in self.cells if cell.folder in sources]
        rest = [cell for cell in self.cells if cell.folder not in sources]
        return [wave for wave in (first, rest) if wave]


def make_plan(config_name: str, arguments: Sequence[str]) -> Plan:
    """Composes and checks every run of a sweep, before anything is trained.

    Raises:
        InputError: there is a mistake in the arguments of any run.
    """
    own = [a for a in arguments if command_line.is_sweep_field(a)]
    settings = compose_settings(own)
    typed = [a for a in arguments if a not in own]
    keys = {_key(a) for a in typed}
    swept = [a for a in settings.axes if _key(a) not in keys] + typed
    rerun = _rerun([a for a in swept if _key(a) == "rerun"])
    expanded = _without_fields_of_absent_remedies(_expand(config_name, swept))
    identity = "\n".join(sorted(" ".join(_identity(cell)) for cell in expanded))
    sweep_id = hashlib.sha256(identity.encode()).hexdigest()[:8]
    study = settings.experiment or f"sweep-{sweep_id}"
    if "study" not in keys and not any(_key(a) == "study" for a in settings.axes):
        expanded = [[*cell, f"study={study}"] for cell in expanded]
    for field in sorted({_key(a) for cell in expanded for a in cell}):
        role = role_of(field)
        makes_no_run = not role.is_hashed and not role.named and role.identifies_sweep
        if makes_no_run and len({a for cell in expanded for a in cell if _key(a) == field}) > 1:
            raise InputError(
                f"{field}: does not distinguish runs, so a sweep takes a single value of it"
            )
    from_experiment = {_key(a) for a in settings.axes} - keys
    try:
        cells, dropped = _with_baselines(config_name, expanded)
    except InputError as error:
        if _key(str(error)) not in from_experiment:
            raise
        raise InputError(f"experiment={settings.experiment}: sets {error}") from error
    for field in ("study", "paths", "tracking"):
        values = dict.fromkeys(str(getattr(cell.config, field)) for cell in cells)
        if len(values) > 1:
            raise InputError(f"{field}: must be the same for all runs of a sweep")
    tracking = cells[0].config.tracking
    if tracking.mlflow and tracking.uri is None:
        default_uri()  # Called only for its check of the address in the environment.
    cells = _with_validation_at_ends(cells)
    if settings.share_prefix:
        cells = _with_shared_prefixes(cells)
    on_cluster = settings.launcher == LAUNCHER
    if on_cluster:
        trainers = [cell.config.trainer for cell in cells]
        check_cluster(trainers, cells[0].config.tracking, settings.launcher_fields)
    for cell in cells:
        if not on_cluster:
            _check_devices(cell.config, n_jobs=settings.n_jobs)
        # A run that has begun continues from its own checkpoint and does not need the state.
        if cell.config.fork is not None and not cell.folder.exists():
            start_fork.check(cell.config, cell.config.fork)
    return Plan(
        study=cells[0].config.study,
        sweep_id=sweep_id,
        settings=settings,
        rerun=rerun,
        cells=cells,
        dropped=dropped,
    )


def _check_devices(config: RunConfig, *, n_jobs: int) -> None:
    """Raises InputError if this machine lacks the devices that the jobs need together."""
    trainer = config.trainer
    trainer.check_device()
    if trainer.device_type == "cuda" and trainer.devices > 1 and n_jobs > 1:
        raise InputError(
            f"n_jobs={n_jobs}: jobs with trainer.devices={trainer.devices} would all use the same"
            " GPUs; type n_jobs=1, or hydra/launcher=slurm, which gives each job its own"
        )


def _rerun(arguments: Sequence[str]) -> bool:
    """The value of `rerun`, which belongs to the sweep: each job is rerun only once."""
    if not arguments:
        return False
    text = parse(arguments)[-1].text
    if text not in ("true", "false"):
        raise InputError(f"rerun={text}: must be true or false")
    return text == "true"


def _key(argument: str) -> str:
    return argument.partition("=")[0].strip()


def _identity(cell: Sequence[str]) -> list[str]:
    return sorted(a for a in cell if role_of(_key(a)).identifies_sweep)


def _expand(config_name: str, arguments: Sequence[str]) -> list[list[str]]:
    """The arguments of each run: the product of all fields with several values."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        # The parser needs the loader to resolve glob(*) into the options of a group.
        with readable(config_name, arguments):
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(
                [a for a in arguments if _key(a) != "rerun"]
            )
            # If a field is typed twice, the last one counts, as in a single run.
            axes = {override.get_key_element(): _values(override) for override in overrides}
    cells = [list(cell) for cell in itertools.product(*axes.values())]
    if not cells:
        empty = [a for a in arguments if "glob(" in a]
        raise InputError(f"{' '.join(empty)}: matches no option; there is nothing to sweep")
    return cells


def _values(override: HydraOverride) -> list[str]:
    """The arguments `field=value` that one argument of a sweep stands for."""
    key = override.get_key_element()
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise InputError(f"{override.input_line}: must be a list of values, such as a,b")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def _remedies(cell: Sequence[str]) -> set[str]:
    """The names of the remedies that a run selects."""
    chosen = [override.text for override in parse(cell) if override.key == "stability"]
    return set(chosen[-1].strip("[]").split(",")) if chosen else set()


def _without_fields_of_absent_remedies(cells: list[list[str]]) -> list[list[str]]:
    """Keeps a field of a remedy only in the runs that have the remedy, if any run has it."""
    swept = set().union(*map(_remedies, cells))

    def belongs(argument: str, cell: Sequence[str]) -> bool:
        section, _, rest = _key(argument).partition(".")
        remedy = rest.partition(".")[0]
        return section != "stability" or remedy not in swept or remedy in _remedies(cell)

    kept = [[a for a in cell if belongs(a, cell)] for cell in cells]
    return [list(cell) for cell in dict.fromkeys(tuple(cell) for cell in kept)]


def _with_baselines(
    config_name: str, expanded: Sequence[Sequence[str]]
) -> tuple[list[Cell], list[str]]:
    """Composes all runs and adds missing baselines: the same run without its remedies.

    Returns:
        The runs, and the names of those left out because their `repeat` would change nothing.
    """
    cells: dict[Path, Cell] = {}
    dropped: list[str] = []
    composer = Composer(config_name)
    composed = [(list(a), composer.config(a)) for a in expanded]
    treated = any(config.remedies for _, config in composed)
    # Without any remedy, all variants are compared with the first.
    reference = None if treated else composed[0][1].variant_name
    swept_folders = {config.folder for _, config in composed}
    for arguments, config in composed:
        if config.repeat and not any(remedy.draws for remedy in config.remedies.values()):
            dropped.append(f"{config.variant_name}/{config.folder.name}")
            continue
        baseline = reference if config.variant_name != reference else None
        if config.remedies:
            untreated_arguments = [
                *(a for a in arguments if _key(a).partition(".")[0] not in ("stability", "repeat")),
                "stability=none",
            ]
            untreated = composer.config(untreated_arguments)
            baseline = untreated.variant_name
            if untreated.folder not in cells:
                cells[untreated.folder] = Cell(
                    config=untreated,
                    arguments=untreated_arguments,
                    baseline=None,
                    added=untreated.folder not in swept_folders,
                )
        if config.folder not in cells:
            cells[config.folder] = Cell(
                config=config, arguments=arguments, baseline=baseline, added=False
            )
    return list(cells.values()), dropped


def _with_validation_at_ends(cells: Sequence[Cell]) -> list[Cell]:
    """Makes baselines validate where arms end early, so that their losses can be compared."""
    ends: dict[tuple[str, int], set[int]] = {}
    for cell in cells:
        recipe, last = cell.config.recipe, cell.config.last_step
        if cell.baseline is not None and last < recipe.max_steps:
            own = recipe.validation_steps()
            ends.setdefault((cell.baseline, cell.config.seed), set()).update({last} - own)
    validating = []
    for cell in cells:
        steps = ends.get((cell.config.variant_name, cell.config.seed), set())
        more = [_steps("validate_at", steps | set(cell.config.validate_at))] if steps else []
        validating.append(dataclasses.replace(cell, arguments=[*cell.arguments, *more]))
    return validating


def _with_shared_prefixes(cells: Sequence[Cell]) -> list[Cell]:
    """Makes arms that act late start from a state of their baseline.

    The baselines save these states, and carry the observers that the arms need from step 0 on.
    """
    baselines = {(c.config.variant_name, c.config.seed): c for c in cells if not c.config.remedies}
    states: dict[Path, set[int]] = {}
    observers: dict[Path, dict[str, Any]] = {}
    starts: dict[Path, Fork] = {}
    for cell in cells:
        source = baselines.get((cell.baseline or "", cell.config.seed))
        step = min(cell.config.default_start_step, cell.config.last_step - 1)
        if source is None or not cell.config.remedies or step < 1 or cell.config.fork is not None:
            continue
        passive = _fields({n: r for n, r in cell.config.remedies.items() if r.is_passive})
        carried = observers.setdefault(source.folder, _fields(source.config.observers))
        if any(carried.get(name, values) != values for name, values in passive.items()):
            continue  # A baseline can carry a remedy with one setting of its fields only.
        carried |= passive
        states.setdefault(source.folder, set()).add(step)
        starts[cell.folder] = Fork(source=source.folder, step=step)
    shared = []
    for cell in cells:
        more = []
        if cell.folder in states:
            more.append(_steps("save_at", states[cell.folder] | set(cell.config.save_at)))
        if observers.get(cell.folder):
            more.append(f"observe={_grammar(observers[cell.folder])}")
        shared.append(
            dataclasses.replace(
                cell,
                arguments=[*cell.arguments, *more],
                start=starts.get(cell.folder),
                observe=observers.get(cell.folder, {}),
            )
        )
    return shared


def _fields(remedies: Mapping[str, RemedyConfig]) -> dict[str, Any]:
    return {name: dataclasses.asdict(remedy) for name, remedy in remedies.items()}


def _steps(field: str, steps: set[int]) -> str:
    return f"{field}={sorted(steps)}".replace(" ", "")


def _grammar(value: Any) -> str:
    """A nested mapping in Hydra's override grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
