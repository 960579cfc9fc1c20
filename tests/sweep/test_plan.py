"""Cells, baselines, shared beginnings: what a sweep would run."""

from pathlib import Path

import pytest

from src.common.errors import InputError
from src.config.hydra_compose import CONF
from src.model.size import measure
from src.sweep.cost import COMPILE_SECONDS
from src.sweep.plan import make_plan
from src.sweep.preview import Estimator
from src.sweep.settings import compose_settings
from src.train import main
from tests.conftest import TINY
from tests.runs import made as made_run
from tests.saved import saved_model

PACE = ("recipe.max_steps=22", "recipe.log_every=1")


def plan(*arguments):
    return make_plan("train", [*TINY, *PACE, *arguments])


def options(made):
    return [(cell.config.variant.stability, cell.config.seed) for cell in made.cells]


def test_the_baseline_is_added_once_a_seed_where_it_is_missing():
    made = plan("stability=clip03,warmdown", "seed=0,1")
    assert sorted(options(made)) == sorted(
        (option, seed) for option in ("none", "clip03", "warmdown") for seed in (0, 1)
    )
    none = [cell for cell in made.cells if not cell.config.remedies]
    assert all(cell.added and cell.baseline is None for cell in none)
    treated = [cell for cell in made.cells if cell.config.remedies]
    assert {cell.baseline for cell in treated} == {none[0].config.variant_name}
    # And it stands before whatever is compared with it.
    assert options(made)[0] == ("none", 0)


def test_a_baseline_that_was_asked_for_is_not_doubled():
    made = plan("stability=none,clip03")
    assert options(made) == [("none", 0), ("clip03", 0)]
    assert not any(cell.added for cell in made.cells)


def test_glob_lists_and_repeats():
    every = {file.stem for file in (CONF / "stability").glob("*.yaml")}
    assert {option for option, _ in options(plan("stability=glob(*)"))} == every
    made = plan("stability=[ema,warmdown],[clip03]")
    assert [option for option, _ in options(made)] == ["none", "ema-warmdown", "clip03"]
    shaken = plan("stability=shaken,clip03", "repeat=0,1,2")
    assert [cell.config.repeat for cell in shaken.cells] == [0, 0, 1, 2, 0]
    # Repeats of what draws nothing would be the same run again, and are said to be left out.
    assert len(shaken.dropped) == 2
    assert all("clip03" in name for name in shaken.dropped)


def test_a_field_of_an_option_goes_to_the_cells_that_have_it():
    made = plan("stability=none,noise,clip03", "stability.noise.std=0.1")
    by_option = {cell.config.variant.stability: cell.config for cell in made.cells}
    assert by_option["noise"].remedies["noise"].std == 0.1
    assert set(by_option) == {"none", "noise", "clip03"}
    assert by_option["none"].variant_name.count("std") == 0
    with pytest.raises(InputError, match=r"stability.noise.std=0.1: stability=noise is not on"):
        plan("stability=none,clip03", "stability.noise.std=0.1")


def test_without_options_all_are_compared_with_the_first():
    made = plan("ffn=moe,mlp", "attention=mlha,gqa")
    names = [cell.config.variant_name for cell in made.cells]
    assert [cell.baseline for cell in made.cells] == [None, *[names[0]] * 3]


def test_each_composition_has_a_baseline_of_its_own():
    made = plan("ffn=moe,moe_writeup", "stability=none,clip03")
    pairs = {(c.config.variant.ffn, c.config.variant.stability): c.baseline for c in made.cells}
    for ffn in ("moe", "moe_writeup"):
        assert pairs[ffn, "none"] is None
        assert pairs[ffn, "clip03"].startswith(f"mlha+{ffn}+none")


def test_late_arms_start_from_their_baseline_and_it_runs_first():
    made = plan("stability=clip03,warmdown,ema,early_stop,[ema,fp32]", "seed=0,1")
    starts = {cell.config.variant.stability: cell.start and cell.start.step for cell in made.cells}
    # 6/11 of 22 is 12, 7/11 is 14; the last step of an arm is its own.
    assert starts == {
        "none": None,
        "clip03": None,
        "warmdown": 12,
        "ema": 21,
        "early_stop": 13,
        "ema-fp32": 12,
    }
    first, rest = made.waves()
    assert {c.config.variant.stability for c in first} == {"none"}
    assert len(first) == 2
    assert len(rest) == 10
    assert "save_at=[12,13,21]" in first[0].arguments
    assert "observe={ema:{decay:0.999,horizon_frac:null}}" in first[0].arguments
    for cell in rest:
        if cell.start is not None:
            assert cell.start.source.name == cell.folder.name


def test_a_baseline_validates_where_an_arm_ends_if_it_does_not_anyway():
    made = plan("stability=early_stop,clip03", "stability.early_stop.stop_frac=0.4,0.5,1.0")
    base = next(cell for cell in made.cells if not cell.config.remedies)
    # 22 steps are validated at every second one: 11 is none of them, 9 (0.4) neither.
    assert "validate_at=[9,11]" in base.arguments
    others = [cell for cell in made.cells if cell.config.remedies]
    assert not any(a.startswith("validate_at") for cell in others for a in cell.arguments)
    whole = plan("stability=early_stop", "stability.early_stop.stop_frac=0.4", "share_prefix=false")
    assert any("validate_at=[9]" in cell.arguments for cell in whole.cells)


def test_what_is_typed_for_the_baseline_stays_beside_what_others_need():
    made = plan("stability=warmdown,ema", "save_at=[3]")
    base = next(cell for cell in made.cells if not cell.config.remedies)
    assert [a for a in base.arguments if a.startswith("save_at")][-1] == "save_at=[3,12,21]"


def test_share_prefix_false_trains_everything_from_nothing():
    made = plan("stability=none,warmdown,ema", "share_prefix=false")
    assert all(cell.start is None for cell in made.cells)
    assert not any(a.startswith(("save_at", "observe")) for c in made.cells for a in c.arguments)
    assert len(made.waves()) == 1


def test_two_averages_are_not_carried_by_one_baseline():
    made = plan("stability=ema", "stability.ema.decay=0.9,0.99")
    starts = {cell.config.variant_name: cell.start for cell in made.cells if cell.config.remedies}
    assert [start is None for start in starts.values()] == [False, True]


def test_the_study_is_named_by_its_cells_whatever_their_order():
    one = plan("stability=clip03,ema", "seed=0,1")
    two = plan("seed=0,1", "stability=clip03,ema")
    assert one.study == two.study == f"sweep-{one.sweep_id}"
    assert plan("stability=clip03", "seed=0,1").sweep_id != one.sweep_id
    assert plan("stability=clip03,ema", "seed=0,1", "rerun=true").sweep_id == one.sweep_id
    assert plan("stability=clip03,ema", "seed=0,1", "study=mine").study == "mine"


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_composes_and_what_is_typed_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # One seed is no sequential study.
    typed = ["seed=7", "tracking=local", "sequential=false"]
    for axis in compose_settings([f"experiment={name}"]).axes:
        # `make convert` puts them there, of other sizes.
        for path in axis.removeprefix("init=").split(",") if axis.startswith("init=") else ():
            saved_model(Path(path.strip("'")))
        # One rate of several: tests/test_experiments.py composes them all.
        if axis.startswith("recipe.learning_rate="):
            typed.append(axis.partition(",")[0])
    made = make_plan("train", [f"experiment={name}", *typed])
    assert made.study == name
    assert {cell.config.seed for cell in made.cells} == {7}
    assert any(cell.baseline is None for cell in made.cells)
    folders = [cell.folder for cell in made.cells]
    assert len(set(folders)) == len(folders)
    # No study holds an arm that is bitwise its baseline.
    notes = [note for cell in made.cells for note in cell.config.notes]
    assert not [note for note in notes if "changes nothing" in note]


@pytest.mark.parametrize("name", sorted(f.stem for f in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_says_what_it_asks_and_costs(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    for part in ("Question:", "Cost:", "Expect:"):
        assert part in text
    commands = {
        "convert": "make convert\n",
        "convert_smollm2": f"make convert CONVERT={name}",
        "smoke": "make ablate EXPERIMENT=smoke",
        "ablate": "make ablate\n",
        "ablate_precision": "make ablate\n",
    }
    assert commands.get(name, f"make reproduce STUDIES={name}") in text


def test_the_stability_study_has_the_writeups_options_the_aa_controls_and_the_positive_control():
    made = make_plan("train", ["experiment=stability"])
    arms = {cell.config.variant.stability for cell in made.cells}
    writeup = {"clip03", "clip05", "clip_value", "early_stop", "warmdown", "noise", "ema"}
    assert arms == writeup | {"lower_lr", "none", "shaken", "shaken_full", "router_eps"}
    assert {cell.config.seed for cell in made.cells} == set(range(1000, 1010))


def test_plan_true_prints_cells_and_cost_and_writes_nothing(tiny, capsys):
    arguments = ["--multirun", *tiny, *PACE, "stability=ema,warmdown", "plan=true"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "(added)" in shown
    assert "to train: 3 runs, 33 steps" in shown
    assert "33 steps come from saved states" in shown
    assert not Path("runs").exists()


def test_what_would_repeat_others_is_one_line_a_variant(tiny, capsys):
    arguments = [
        "--multirun",
        *tiny,
        *PACE,
        "stability=none,shaken,ema",
        "seed=1,2",
        "repeat=0,1,2",
    ]
    assert main([*arguments, "plan=true"]) == 0
    shown = [x for x in capsys.readouterr().out.splitlines() if x.startswith("left out:")]
    assert sorted("ema" in line for line in shown) == [False, True]
    assert all(line.endswith("and 3 more would repeat other runs bit by bit") for line in shown)


def test_the_cost_of_a_compiled_run_counts_its_compilation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("src.sweep.preview.step_seconds", lambda *args, **kwargs: 0.5)
    whole = {}
    for compiled in ("true", "false"):
        (cell,) = make_plan("train", [*TINY, f"compile={compiled}", "stability=none"]).cells
        whole[compiled] = Estimator().cost(cell).seconds
    assert whole["true"] - whole["false"] == COMPILE_SECONDS


CASES = {
    "n_jobs=0": "n_jobs=0: must be an integer from 1",
    "n_jobs=1,2": "n_jobs=1,2: must be a single value",
    "hydra.launcher.n_jobs=0": "hydra.launcher.n_jobs=0: type n_jobs=",
    "experiment=smoke,stability": "experiment=smoke,stability: must be a single value",
    "experiment=null": "experiment=null: must be the name of a file in conf/experiment",
    "stability=glob(nope*)": "stability=glob(nope*): matches no option",
    "observe=ema": "observe=ema: must be {<remedy>: {<its fields>}}",
    "fork=nowhere@3": "fork=nowhere@3: nowhere is not a run folder",
    "trainer.activation_checkpointing=true,false": "does not distinguish runs, so a sweep takes",
    "trainer.devices=1,2": "does not distinguish runs, so a sweep takes a single",
    "n_jobs=many": "n_jobs=many: must be an integer from 1",
    "study=one,two": "study: must be the same for all runs of a sweep",
    "rerun=yess": "rerun=yess: must be true or false",
    "timeout=-1": "timeout=-1: must be seconds above 0, or null",
    "share_prefix=perhaps": "share_prefix=perhaps: must be true or false",
    "experiment=stabilty": "experiment=stabilty: unknown option; did you mean stability?",
    "hydra/launcher=cloud": "hydra/launcher=cloud",
    "stability=clip03,clip04": "stability=clip04: unknown option; did you mean clip0",
    "recipe.max_steps=5,abc": "recipe.max_steps=abc: must be an integer",
}


@pytest.mark.parametrize("argument", sorted(CASES))
def test_bad_sweeps_are_one_line_before_anything_is_written(argument, tiny, capsys):
    assert main(["--multirun", *tiny, "seed=0,1", argument]) == 2
    error = capsys.readouterr().err
    assert CASES[argument] in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(("threads", "is_warned"), [(1, False), (2, True)])
def test_jobs_with_more_threads_than_cores_are_warned_of(
    tiny, capsys, monkeypatch, threads, is_warned
):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    pace = [*PACE, "n_jobs=2", f"trainer.threads={threads}", "trainer=cpu"]
    assert main(["--multirun", *tiny, *pace, "seed=0,1", "plan=true"]) == 0
    printed = "".join(capsys.readouterr())
    assert ("more than the 2 cores of this machine" in " ".join(printed.split())) is is_warned


@pytest.mark.parametrize("argument", ["n_jobs=2", "experiment=smoke", "timeout=9"])
def test_a_field_of_sweeps_without_multirun_is_said_to_be_one(argument, tiny, capsys):
    assert main([*tiny, argument]) == 2
    assert f"{argument}: is a field of sweeps; add --multirun" in capsys.readouterr().err


def test_a_finished_baseline_without_the_right_state_is_no_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = plan("stability=warmdown", f"paths.cache={tmp_path}")
    base, arm = made.cells
    finished = {base.folder: True, arm.folder: False}
    assert made.without_missing_states({base.folder: False, arm.folder: False}) == made
    assert made.without_missing_states(finished).cells[1].start is None
    state = base.folder / "checkpoints" / "state-12.key"
    state.parent.mkdir(parents=True)
    state.write_text("of other code")
    assert made.without_missing_states(finished).cells[1].start is None
    state.write_text(base.key(12))
    assert made.without_missing_states(finished).cells[1].start is not None


def test_rerun_is_read_as_true_in_any_spelling():
    assert plan("stability=none", "rerun=True").rerun
    assert not plan("stability=none", "rerun=true", "rerun=false").rerun


def test_a_fork_that_cannot_begin_is_refused_before_anything_is_written(tiny, capsys):
    base = made_run([*tiny, *PACE, "study=base", "save_at=[9]"])
    for fork, more, message in (
        (f"{base}@7", [], "no state is saved at that step (saved: 9)"),
        (f"{base}@9", ["attention=gqa"], "its state does not fit"),
    ):
        arguments = ["stability=shaken_full", "study=other", f"fork={fork}", *more]
        assert main(["--multirun", *tiny, *PACE, *arguments]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("runs/other").exists()


def test_an_arm_that_ends_where_a_finished_baseline_has_no_loss_is_told(tiny, capsys):
    stop = ["stability=early_stop", "stability.early_stop.stop_frac=0.4", "study=base"]
    told = "it ends at step 9 and the finished baseline has not validated there"
    made_run([*tiny, *PACE, "study=base"])
    assert main(["--multirun", *tiny, *PACE, *stop, "plan=true"]) == 0
    assert told in capsys.readouterr().err.replace("\n", " ")
    made_run([*tiny, *PACE, "study=base", "validate_at=[9]", "seed=1"])
    assert main(["--multirun", *tiny, *PACE, *stop, "seed=1", "plan=true"]) == 0
    assert told not in capsys.readouterr().err.replace("\n", " ")


def test_a_fork_that_is_typed_costs_what_comes_after_it(tiny):
    base = made_run([*tiny, *PACE, "study=base", "save_at=[9]"])
    made = make_plan("train", [*tiny, *PACE, f"fork='{base}@9'", "stability=none,clip03"])
    assert [(cell.first_step, cell.own_steps) for cell in made.cells] == [(9, 13), (9, 13)]


def test_the_architectures_have_one_width_and_one_number_of_active_parameters():
    made = make_plan("train", ["experiment=architecture", "seed=0", "tracking=local"])
    active = {}
    for cell in made.cells:
        c = cell.config
        size = measure(model=c.model, attention=c.attention, ffn=c.ffn, vocab_size=59, seq_len=64)
        assert c.model.hidden_dim == 64
        routers = size.params_by_part.get("routers", 0)
        active[c.variant.attention, c.variant.ffn] = size.params_active - routers
    assert len(active) == 6
    assert len(set(active.values())) == 1


def test_a_sequential_sweep_adds_untreated_runs_and_looks_at_growing_shares_of_the_seeds():
    made = plan("stability=clip03,clip05,zclip,ema,noise,warmdown,lower_lr", "seed=range(12)")
    looked = plan(
        "stability=clip03,clip05,zclip,ema,noise,warmdown,lower_lr",
        "seed=range(12)",
        "sequential=true",
    )
    assert made.looks == [] and [len(look) for look in looked.looks] == [3, 6, 12]
    # Seven arms are served best by three untreated runs a seed: the baseline and two A/A runs.
    shaken = [cell for cell in looked.cells if cell.config.variant.stability == "shaken_full"]
    assert len(shaken) == 2 * 12 and len(looked.cells) == len(made.cells) + len(shaken)
    assert {(cell.config.seed, cell.config.repeat) for cell in shaken} == {
        (seed, repeat) for seed in range(12) for repeat in (0, 1)
    }
    assert all(cell.added and cell.baseline for cell in shaken)
    # It leaves out runs, so it is another sweep.
    assert looked.sweep_id != made.sweep_id


def test_a_sequential_sweep_keeps_the_untreated_runs_that_were_typed():
    made = plan("stability=shaken_full,clip03", "repeat=0,1,2", "seed=range(12)", "sequential=true")
    shaken = [cell for cell in made.cells if cell.config.variant.stability == "shaken_full"]
    assert len(shaken) == 3 * 12 and not any(cell.added for cell in shaken)


def test_a_sequential_sweep_needs_seeds_and_remedies():
    with pytest.raises(InputError, match=r"sequential=true: needs at least 12 seeds.*are 6"):
        plan("stability=clip03", "seed=range(6)", "sequential=true")
    with pytest.raises(InputError, match="sequential=true: compares remedies, and there is none"):
        plan("ffn=mlp,moe", "seed=range(12)", "sequential=true")
    with pytest.raises(InputError, match="sequential=maybe: must be true or false"):
        plan("stability=clip03", "seed=range(12)", "sequential=maybe")
