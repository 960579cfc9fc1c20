"""From a command line with several values to the cells of a sweep, in the order they must run."""

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
    """All that its command is given."""
    baseline: str | None
    """Name of the variant that it is compared with."""
    added: bool
    """Whether it was added as somebody's baseline."""
    start: Fork | None = None
    """The saved state of its baseline, from which it can begin."""
    observe: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options that it carries for others, with their fields."""

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return self.config.folder

    def key(self, step: int) -> str:
        """What the state that it saves after a step must hang on."""
        return start_fork.state_key(self.config.config_hash(), self.observe, step)

    @property
    def first_step(self) -> int:
        """Steps that it takes from a saved state, its baseline's or that of the fork typed."""
        origin = self.start or self.config.fork
        return 0 if origin is None else origin.step

    @property
    def own_steps(self) -> int:
        """Steps that it trains itself."""
        return self.config.last_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole sweep, checked."""

    study: str
    sweep_id: str
    settings: SweepSettings
    rerun: bool
    cells: list[Cell]
    """As they were swept, each baseline before the first that is compared with it."""
    dropped: list[str]
    """Cells that would repeat another bit by bit, by name."""

    @property
    def folder(self) -> Path:
        """runs/<study>."""
        return Path(self.cells[0].config.paths.runs) / self.study

    def with_states_that_will_be(self, finished: Mapping[Path, bool]) -> "Plan":
        """Without starts from a baseline that is finished and has not saved the right state."""
        by_folder = {cell.folder: cell for cell in self.cells}

        def will_be(start: Fork) -> bool:
            right = by_folder[start.source].key(start.step)
            return not finished[start.source] or start.key == right

        cells = [
            cell
            if cell.start is None or will_be(cell.start)
            else dataclasses.replace(cell, start=None)
            for cell in self.cells
        ]
        return dataclasses.replace(self, cells=cells)

    def waves(self) -> list[list[Cell]]:
        """Those that others start from, and then all others."""
        sources = {cell.start.source for cell in self.cells if cell.start is not None}
        first = [cell for cell in self.cells if cell.folder in sources]
        rest = [cell for cell in self.cells if cell.folder not in sources]
        return [wave for wave in (first, rest) if wave]


def make_plan(config_name: str, arguments: Sequence[str]) -> Plan:
    """Every cell of a sweep, composed and checked, before anything is trained.

    Raises:
        InputError: any cell is bad input.
    """
    own = [a for a in arguments if command_line.is_sweep_field(a)]
    settings = compose_settings(own)
    typed = [a for a in arguments if a not in own]
    keys = {_key(a) for a in typed}
    swept = [a for a in settings.axes if _key(a) not in keys] + typed
    rerun = _rerun([a for a in swept if _key(a) == "rerun"])
    expanded = _fields_where_they_belong(_expand(config_name, swept))
    identity = "\n".join(sorted(" ".join(_identity(cell)) for cell in expanded))
    sweep_id = hashlib.sha256(identity.encode()).hexdigest()[:8]
    study = settings.experiment or f"sweep-{sweep_id}"
    if "study" not in keys and not any(_key(a) == "study" for a in settings.axes):
        expanded = [[*cell, f"study={study}"] for cell in expanded]
    for field in sorted({_key(a) for cell in expanded for a in cell}):
        role = role_of(field)
        makes_no_run = not role.is_hashed and not role.named and role.identifies_sweep
        if makes_no_run and len({a for cell in expanded for a in cell if _key(a) == field}) > 1:
            raise InputError(f"{field}: makes no other run, so a sweep has one value of it")
    brought = {_key(a) for a in settings.axes} - keys
    try:
        cells, dropped = _with_baselines(config_name, expanded)
    except InputError as error:
        if _key(str(error)) not in brought:
            raise
        raise InputError(f"experiment={settings.experiment}: sets {error}") from error
    for field in ("study", "paths", "tracking"):
        values = dict.fromkeys(str(getattr(cell.config, field)) for cell in cells)
        if len(values) > 1:
            raise InputError(f"{field}: a sweep has one, not {len(values)}")
    tracking = cells[0].config.tracking
    if tracking.mlflow and tracking.uri is None:
        default_uri()  # checked before anything is written
    cells = _validating(cells)
    if settings.share_prefix:
        cells = _sharing(cells)
    on_cluster = settings.launcher == LAUNCHER
    if on_cluster:
        trainers = [cell.config.trainer for cell in cells]
        check_cluster(trainers, cells[0].config.tracking, settings.launcher_fields)
    for cell in cells:
        if not on_cluster:
            _check_devices(cell.config, n_jobs=settings.n_jobs)
        # One that has begun goes on from its own checkpoint, wherever the state has gone.
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
    """Raises InputError unless this machine has what jobs beside each other need."""
    trainer = config.trainer
    trainer.check_device()
    if trainer.device_type == "cuda" and trainer.devices > 1 and n_jobs > 1:
        raise InputError(
            f"n_jobs={n_jobs}: jobs of trainer.devices={trainer.devices} GPUs each would take the"
            " same ones; n_jobs=1, or hydra/launcher=slurm, which gives each its own"
        )


def _rerun(arguments: Sequence[str]) -> bool:
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
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        # The loader lets glob(*) list a group's options.
        with readable(config_name, arguments):
            overrides = OverridesParser.create(config_loader=loader).parse_overrides(
                [a for a in arguments if _key(a) != "rerun"]
            )
            # Of a field that is given twice the last one counts, as in a single run.
            axes = {override.get_key_element(): _values(override) for override in overrides}
    cells = [list(cell) for cell in itertools.product(*axes.values())]
    if not cells:
        empty = [a for a in arguments if "glob(" in a]
        raise InputError(f"{' '.join(empty)}: matches no option, so there is nothing to sweep")
    return cells


def _values(override: HydraOverride) -> list[str]:
    """The arguments that one argument of a sweep stands for."""
    key = override.get_key_element()
    if override.is_sweep_override():
        if not override.is_discrete_sweep():
            raise InputError(f"{override.input_line}: a sweep needs a list of values")
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    return [f"{key}={override.get_value_element_as_str()}"]


def _options(cell: Sequence[str]) -> set[str]:
    """The stability options that a cell chooses."""
    chosen = [override.text for override in parse(cell) if override.key == "stability"]
    return set(chosen[-1].strip("[]").split(",")) if chosen else set()


def _fields_where_they_belong(cells: list[list[str]]) -> list[list[str]]:
    """A field of an option goes to the cells that have the option, where any has."""
    swept = set().union(*map(_options, cells))

    def belongs(argument: str, cell: Sequence[str]) -> bool:
        section, _, rest = _key(argument).partition(".")
        option = rest.partition(".")[0]
        return section != "stability" or option not in swept or option in _options(cell)

    kept = [[a for a in cell if belongs(a, cell)] for cell in cells]
    return [list(cell) for cell in dict.fromkeys(tuple(cell) for cell in kept)]


def _with_baselines(
    config_name: str, expanded: Sequence[Sequence[str]]
) -> tuple[list[Cell], list[str]]:
    """Composes all cells and adds the untreated one of each that is missing."""
    cells: dict[Path, Cell] = {}
    dropped: list[str] = []
    composer = Composer(config_name)
    composed = [(list(a), composer.config(a)) for a in expanded]
    treated = any(config.remedies for _, config in composed)
    reference = None if treated else composed[0][1].variant_name
    given = {config.folder for _, config in composed}
    for arguments, config in composed:
        if config.repeat and not any(remedy.draws for remedy in config.remedies.values()):
            dropped.append(f"{config.variant_name}/{config.folder.name}")
            continue
        baseline = reference if config.variant_name != reference else None
        if config.remedies:
            plain = [a for a in arguments if _key(a).partition(".")[0] != "stability"]
            plain = [a for a in plain if _key(a) != "repeat"]
            plain.append("stability=none")
            untreated = composer.config(plain)
            baseline = untreated.variant_name
            if untreated.folder not in cells:
                cells[untreated.folder] = Cell(
                    config=untreated,
                    arguments=plain,
                    baseline=None,
                    added=untreated.folder not in given,
                )
        if config.folder not in cells:
            cells[config.folder] = Cell(
                config=config, arguments=arguments, baseline=baseline, added=False
            )
    return list(cells.values()), dropped


def _validating(cells: Sequence[Cell]) -> list[Cell]:
    """Has baselines validate where an arm ends early, so that losses are compared there."""
    ends: dict[tuple[str, int], set[int]] = {}
    for cell in cells:
        recipe, last = cell.config.recipe, cell.config.last_step
        if cell.baseline is not None and last < recipe.max_steps:
            own = recipe.validation_steps()
            ends.setdefault((cell.baseline, cell.config.seed), set()).update({last} - own)
    found = []
    for cell in cells:
        steps = ends.get((cell.config.variant_name, cell.config.seed), set())
        more = [_steps("validate_at", steps | set(cell.config.validate_at))] if steps else []
        found.append(dataclasses.replace(cell, arguments=[*cell.arguments, *more]))
    return found


def _sharing(cells: Sequence[Cell]) -> list[Cell]:
    """Has baselines save the states, and carry the observers, that later cells start from."""
    by_place = {(c.config.variant_name, c.config.seed): c for c in cells if not c.config.remedies}
    states: dict[Path, set[int]] = {}
    observers: dict[Path, dict[str, Any]] = {}
    starts: dict[Path, Fork] = {}
    for cell in cells:
        source = by_place.get((cell.baseline or "", cell.config.seed))
        step = min(cell.config.default_start_step, cell.config.last_step - 1)
        if source is None or not cell.config.remedies or step < 1 or cell.config.fork is not None:
            continue
        watching = _fields({n: r for n, r in cell.config.remedies.items() if r.is_passive})
        carried = observers.setdefault(source.folder, _fields(source.config.observers))
        if any(carried.get(name, values) != values for name, values in watching.items()):
            continue  # one baseline carries one average
        carried |= watching
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
    """A nested mapping in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_grammar(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)
