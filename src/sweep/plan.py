"""Plans a sweep: which runs a command line with several values stands for, and in which order."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.cli.name_checks import is_sweep_field
from src.common.errors import InputError
from src.common.override_grammar import parse
from src.common.tracking_address import default_uri
from src.config.field_roles import role_of
from src.config.fork import Fork
from src.config.remedy_roles import AA_CONTROL
from src.config.run_config import RunConfig
from src.run import start_fork
from src.stability import RemedyConfig
from src.study.analysis.looks import FAILURES, LEAST_SEEDS, num_untreated, seeds_by_look
from src.sweep.cluster import LAUNCHER, check_cluster
from src.sweep.composer import Composer
from src.sweep.expand import expand, key_of, naming_experiment, read_sweep
from src.sweep.settings import SweepSettings


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    config: RunConfig
    arguments: list[str]
    """The arguments of src.train."""
    baseline: str | None
    """The name of the variant that the run is compared with; None for a baseline."""
    added: bool
    """Whether the sweep added the run, as a baseline or an A/A control."""
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
    looks: list[list[int]]
    """The seeds of each look of a sequential sweep; otherwise empty."""
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
    settings, swept = read_sweep(arguments)
    keys = {key_of(a) for a in arguments if not is_sweep_field(a)}
    rerun = _rerun([a for a in swept if key_of(a) == "rerun"])
    expanded = expand(config_name, swept)
    identity = "\n".join(sorted(" ".join(_identity(cell)) for cell in expanded))
    # A sequential sweep leaves out runs that the same sweep with all seeds would make.
    identity += "\nsequential" if settings.sequential else ""
    identity += "" if settings.primary == FAILURES else f"\nprimary={settings.primary}"
    sweep_id = hashlib.sha256(identity.encode()).hexdigest()[:8]
    study = settings.experiment or f"sweep-{sweep_id}"
    if "study" not in keys and not any(key_of(a) == "study" for a in settings.axes):
        expanded = [[*cell, f"study={study}"] for cell in expanded]
    for field in sorted({key_of(a) for cell in expanded for a in cell}):
        role = role_of(field)
        makes_no_run = not role.is_hashed and not role.named and role.identifies_sweep
        if makes_no_run and len({a for cell in expanded for a in cell if key_of(a) == field}) > 1:
            raise InputError(
                f"{field}: does not distinguish runs, so a sweep takes a single value of it"
            )
    with naming_experiment(settings, arguments):
        composer = Composer(config_name)
        cells, dropped = _with_baselines(composer, expanded)
    looks = []
    if settings.sequential:
        looks = _planned_looks(cells)
        cells = _with_controls(composer, cells)
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
        looks=looks,
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


def _identity(cell: Sequence[str]) -> list[str]:
    return sorted(a for a in cell if role_of(key_of(a)).identifies_sweep)


def _with_baselines(
    composer: Composer, expanded: Sequence[Sequence[str]]
) -> tuple[list[Cell], list[str]]:
    """Composes all runs and adds missing baselines: the same run without its remedies.

    Returns:
        The runs, and the names of those left out because their `repeat` would change nothing.
    """
    cells: dict[Path, Cell] = {}
    dropped: list[str] = []
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
            of_treatment = ("stability", "repeat")
            others = [a for a in arguments if key_of(a).partition(".")[0] not in of_treatment]
            untreated_arguments = [*others, "stability=none"]
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


def _planned_looks(cells: Sequence[Cell]) -> list[list[int]]:
    """The seeds of each look; raises InputError if they are too few, or nothing is compared."""
    seeds = list(dict.fromkeys(cell.config.seed for cell in cells))
    if len(seeds) < LEAST_SEEDS:
        raise InputError(
            f"sequential=true: needs at least {LEAST_SEEDS} seeds, and there"
            f" {'is 1' if len(seeds) == 1 else f'are {len(seeds)}'}; type 'seed=range(20)'"
        )
    if not any(cell.config.remedies for cell in cells):
        raise InputError("sequential=true: compares remedies, and there is none; type stability=")
    return seeds_by_look(seeds)


def _with_controls(composer: Composer, cells: Sequence[Cell]) -> list[Cell]:
    """Adds A/A runs to each baseline that has none, as many as its number of arms asks for."""
    arms = arms_by_baseline(cells)
    has_own = {cell.baseline for cell in cells if is_aa_control(cell.config)}
    found = []
    for cell in cells:
        found.append(cell)
        name = cell.config.variant_name
        if name not in arms or name in has_own:
            continue
        others = [a for a in cell.arguments if key_of(a) not in ("stability", "repeat")]
        for repeat in range(num_untreated(len(arms[name])) - 1):
            arguments = [*others, "stability=shaken_full", f"repeat={repeat}"]
            control = composer.config(arguments)
            found.append(Cell(config=control, arguments=arguments, baseline=name, added=True))
    return found


def arms_by_baseline(cells: Sequence[Cell]) -> dict[str, list[str]]:
    """The names of the arms that are compared with each baseline, without its A/A controls."""
    found: dict[str, dict[str, None]] = {}
    for cell in cells:
        if cell.baseline is not None and not is_aa_control(cell.config):
            found.setdefault(cell.baseline, {})[cell.config.variant_name] = None
    return {baseline: list(names) for baseline, names in found.items()}


def is_aa_control(config: RunConfig) -> bool:
    """Whether a run is its baseline, perturbed."""
    roles = {remedy.role for remedy in config.remedies.values()}
    return roles == {AA_CONTROL}


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
