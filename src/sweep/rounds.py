"""The rounds of a sequential sweep: after each look, only undecided arms get further seeds."""

from collections.abc import Iterator, Mapping, Sequence

from src.common import terminal
from src.common.errors import InputError
from src.config.variant_name import short_names
from src.study.analysis.analyse import arm_results
from src.study.analysis.frames import spans
from src.study.analysis.looks import decision, num_untreated, so_far
from src.study.read.collect import collect, recorded_looks, recorded_primary
from src.sweep.manifest import Manifest
from src.sweep.plan import Cell, Plan, arms_by_baseline, is_aa_control


def check_looks(plan: Plan) -> None:
    """Raises InputError if the study was planned with another primary endpoint or other looks.

    Looking at other seeds than planned, after having seen results, would find too many effects.
    """
    named, primary = recorded_primary(plan.folder), plan.settings.primary
    if named not in (None, primary):
        raise InputError(
            f"primary={primary}: the first sweep of {plan.study} set primary={named};"
            " type study=<new name>"
        )
    known = recorded_looks(plan.folder)
    for cell in plan.cells if plan.looks else ():
        others = known.get(cell.config.variant_name, plan.looks)
        if others != plan.looks:
            sizes = ", ".join(str(len(look)) for look in others)
            raise InputError(
                f"sequential=true: {plan.study} was planned with looks after {sizes} of the seeds"
                f" {spans(others[-1])}, and looks that are chosen afterwards find too"
                " many effects; type study=<new name>"
            )


def rounds(plan: Plan, manifest: Manifest) -> Iterator[list[Cell]]:
    """The runs of each round; the caller runs them before it asks for the next.

    A sweep that is not sequential has a single round.
    """
    if not plan.looks:
        yield plan.cells
        return
    decided: dict[str, int] = {}
    seeds_so_far: set[int] = set()
    for look, seeds in enumerate(plan.looks, 1):
        undecided = {
            baseline: [name for name in names if name not in decided]
            for baseline, names in arms_by_baseline(plan.cells).items()
        }
        needed = []
        for cell in plan.cells:
            if cell.config.seed not in set(seeds) - seeds_so_far:
                continue
            if _is_needed(cell, undecided):
                needed.append(cell)
            elif not manifest.is_finished(cell):
                manifest.set(cell, "not needed", _why_not_needed(cell, decided))
        seeds_so_far |= set(seeds)
        if needed:
            yield needed
            _decide(plan, decided, look)


def _is_needed(cell: Cell, undecided: Mapping[str, Sequence[str]]) -> bool:
    """Whether a run can still decide something: its arm, or one that is compared with it.

    Args:
        cell: the run.
        undecided: the names of undecided arms, by baseline.
    """
    name = cell.config.variant_name
    if cell.baseline is None:
        return bool(undecided.get(name))
    arms = undecided.get(cell.baseline, ())
    # Fewer arms need fewer A/A runs; those that were typed are run while any arm is undecided.
    if not is_aa_control(cell.config):
        return name in arms
    return bool(arms) and (not cell.added or cell.config.repeat < num_untreated(len(arms)) - 1)


def _why_not_needed(cell: Cell, decided: Mapping[str, int]) -> str:
    name = cell.config.variant_name
    if name in decided:
        return f"decided after {decided[name]} seeds"
    return "fewer arms are undecided"


def _decide(plan: Plan, decided: dict[str, int], look: int) -> None:
    """Looks at the results so far, prints them, and adds the arms that are decided to `decided`.

    Args:
        plan: the sweep's plan.
        decided: by arm, the number of seeds after which it was decided.
        look: the number of the look, from 1.
    """
    arms = {
        arm.variant: arm
        for arm in arm_results(collect(plan.folder.parent, plan.study))
        if arm.comparisons and not arm.is_aa_control
    }
    names = [name for each in arms_by_baseline(plan.cells).values() for name in each]
    shorts = short_names([cell.config.variant_name for cell in plan.cells])
    is_last = look == len(plan.looks)
    terminal.say(f"look {look} of {len(plan.looks)}, after {len(plan.looks[look - 1])} seeds:")
    for name in names:
        if name in decided or name not in arms:
            continue
        arm = arms[name]
        why = decision(arm, plan.settings.primary)
        if why is not None:
            decided[name] = len(plan.looks[look - 1])
            terminal.say(f"  {shorts[name]}: {why}")
        else:
            end = "the seeds are used up" if is_last else "gets more seeds"
            terminal.say(
                f"  {shorts[name]}: {so_far(arm, plan.settings.primary)}, undecided; {end}"
            )
