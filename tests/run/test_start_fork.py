"""A run that begins from another's saved state."""

import json
import re
from pathlib import Path

import pytest
import yaml

from src.common.environment import code_digest
from src.config.compose import compose
from src.run import start_fork
from src.run.start_fork import state_key
from src.stability import REMEDIES
from src.train import main
from tests.runs import (
    assert_same_tree,
    comparable,
    last_checkpoint,
    made,
    metrics,
    record,
    stop_after,
    train,
    weights,
)
from tests.stability.harnessed import PACE, START, STEPS

EMA_FIELDS = {"decay": 0.999, "horizon_frac": None}
EMA = "observe={ema:{decay:0.999,horizon_frac:null}}"
FAILING = ("ffn=moe_writeup_add", "recipe.precision=32-true", "model.sizes.writeup_bias_rate=400.0")
LATE = [
    *("early_stop", "ema", "fp32", "noise", "router_eps", "router_eps20", "router_freeze"),
    *("shaken", "warmdown"),
]


def own_figures(lines):
    """What an option logs of itself starts with it, and a fork starts there."""
    return [
        {n: v for n, v in line.items() if not n.startswith("stability/") or line["step"] > START}
        for line in lines
    ]


def assert_same(forked: Path, whole: Path) -> None:
    assert own_figures(metrics(forked)) == own_figures(metrics(whole))
    one, two = (comparable(last_checkpoint(folder)) for folder in (forked, whole))
    assert_same_tree(one, two)
    assert_same_record(forked, whole)


def assert_same_record(forked: Path, whole: Path) -> None:
    left, right = record(forked), record(whole)
    for name in ("outcome", "steps", "tokens", "guard", "spikes", "best", "acts_from"):
        assert left[name] == right[name], name
    assert left["config_hash"] == right["config_hash"]
    assert left["variant_name"] == right["variant_name"]


def test_the_options_that_start_late_are_those_one_expects():
    starts = {
        name: compose("train", [f"stability={name}", "ffn=moe_writeup"]).default_start_step
        for name in REMEDIES
    }
    assert sorted(name for name, start in starts.items() if start > 0) == LATE


# Those that start at one step, in one run; each in one of its own in `make test-all`. Of the two
# epsilons only one can be on.
AT_START = [option for option in LATE if option not in ("early_stop", "ema", "router_eps20")]
ALONE = [pytest.param([option], marks=pytest.mark.slow) for option in [*AT_START, "router_eps20"]]


@pytest.mark.parametrize("options", [["early_stop"], ["ema"], AT_START, *ALONE], ids="+".join)
def test_from_a_shared_beginning_every_late_option_is_bitwise_as_from_nothing(options, tiny):
    arguments = [*tiny, *PACE, "ffn=moe_writeup"]
    step = {"ema": STEPS - 1, "early_stop": 13}.get(options[0], START)
    option = f"stability=[{','.join(options)}]"
    whole = train(arguments, option, "study=whole")
    base = made(arguments, "study=base", f"save_at=[{step}]", EMA)
    forked = train(arguments, option, "study=forked", f"fork={base}@{step}")
    assert_same(forked, whole)
    branch = record(forked)
    assert branch["derived_from"] == {"run": "/".join(base.parts[-3:]), "step": step}
    assert branch["own_steps"] == branch["steps"] - step
    assert record(whole)["own_steps"] == branch["steps"]


@pytest.mark.parametrize(("option", "step"), [("ema", STEPS - 1), ("noise", START)])
def test_an_option_that_would_act_after_the_end_of_its_baseline_ends_with_it(option, step, tiny):
    arguments = [*tiny, *PACE, *FAILING, "guard.on_nonfinite=stop"]
    whole = train(arguments, f"stability={option}", "study=whole")
    base = made(arguments, "study=base", f"save_at=[{step}]", EMA)
    end = record(base)["steps"]
    assert end < step
    forked = train(arguments, f"stability={option}", "study=forked", f"fork={base}@{step}")
    assert own_figures(metrics(forked)) == own_figures(metrics(whole))
    assert_same_tree(weights(forked), weights(whole))
    assert_same_record(forked, whole)
    branch = record(forked)
    assert branch["outcome"] == "stopped"
    assert branch["derived_from"]["step"] == end
    assert branch["own_steps"] == 0
    assert branch["incident"] == record(whole)["incident"]


def test_only_a_guard_that_ends_a_run_leaves_its_last_state_for_later_steps(tiny, monkeypatch):
    stop_after(monkeypatch, 3)
    assert main([*tiny, *PACE, "study=cut", "save_at=[3,7]"]) == 143
    (folder,) = Path("runs/cut").glob("*/seed-0")
    assert [file.name for file in (folder / "checkpoints").glob("*.key")] == ["state-3.key"]


def test_two_options_share_the_beginning_of_the_first_and_averages_come_along(tiny):
    arguments = [*tiny, *PACE]
    base = made(arguments, "study=base", f"save_at=[{START}]", EMA)
    options = "stability=[ema,warmdown]"
    whole = train(arguments, options, "study=whole")
    forked = train(arguments, options, "study=forked", f"fork={base}@{START}")
    assert_same_tree(*(comparable(last_checkpoint(f)) for f in (forked, whole)))
    assert [line.get("val_ema/loss") for line in metrics(forked)] == [
        line.get("val_ema/loss") for line in metrics(whole)
    ]


def test_a_baseline_that_saves_and_observes_is_bitwise_one_that_does_not(tiny):
    plain = made([*tiny, *PACE, "study=plain"])
    used = train([*tiny, *PACE, "study=used", "save_at=[5,12]", EMA])
    assert record(plain)["config_hash"] == record(used)["config_hash"]
    for one, two in zip(metrics(plain), metrics(used), strict=True):
        assert one.items() <= two.items()
    assert_same_tree(last_checkpoint(plain)["state_dict"], last_checkpoint(used)["state_dict"])
    states = sorted(file.name for file in (used / "checkpoints").glob("state-*"))
    assert states == ["state-12.ckpt", "state-12.key", "state-5.ckpt", "state-5.key"]


def test_validations_for_others_are_no_part_of_the_run_nor_of_its_forks(tiny):
    plain = made([*tiny, *PACE, "study=plain"])
    used = train([*tiny, *PACE, "study=used", "validate_at=[3,5]", f"save_at=[{START}]"])
    assert record(plain)["config_hash"] == record(used)["config_hash"]
    ours = {line["step"]: line["val/loss"] for line in metrics(used) if "val/loss" in line}
    theirs = {line["step"]: line["val/loss"] for line in metrics(plain) if "val/loss" in line}
    assert ours.keys() - theirs.keys() == {3, 5}
    assert theirs.items() <= ours.items()
    for name in ("best", "final"):
        assert {k: v for k, v in record(plain)[name].items() if not k.startswith("speed")} == {
            k: v for k, v in record(used)[name].items() if not k.startswith("speed")
        }
    whole = train([*tiny, *PACE, "stability=warmdown", "study=whole"])
    forked = train([*tiny, *PACE, "stability=warmdown", "study=forked", f"fork={used}@{START}"])
    assert_same(forked, whole)


def test_a_fork_that_is_interrupted_goes_on(tiny, monkeypatch):
    base = made([*tiny, *PACE, "study=base", f"save_at=[{START}]"])
    arguments = [*tiny, *PACE, "stability=warmdown", f"fork={base}@{START}"]
    whole = train(arguments, "study=whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 16)
        assert main([*arguments, "study=cut"]) == 143
    assert main([*arguments, "study=cut"]) == 0
    (cut,) = Path("runs/cut").glob("*/seed-0")
    assert_same_tree(comparable(last_checkpoint(cut)), comparable(last_checkpoint(whole)))
    assert record(cut)["derived_from"] == record(whole)["derived_from"]


def test_a_fork_takes_over_what_its_source_was_told_and_the_incidents_before_it(tiny):
    base = made([*tiny, *PACE, *FAILING, "study=base", "save_at=[20]", "seed=3"])
    step = record(base)["incident"]["step"]
    assert step <= 20
    forked = train([f"fork={base}@20", "stability=none", "study=again", tiny[-1], tiny[1]])
    assert forked.parent.name == base.parent.name
    assert forked.name == "seed-3"
    assert record(forked)["incident"] == record(base)["incident"]
    place = forked / "incidents" / f"step-{step}"
    command = f"python -m src.replay incident={place}"
    assert json.loads((place / "incident.json").read_text())["next"] == command
    page = (place / "incident.html").read_text()
    assert command in page and str(base) not in page
    assert record(forked)["guard"] == record(base)["guard"]


def test_an_option_that_acts_earlier_than_the_fork_is_another_run_by_name_and_hash(tiny):
    base = made([*tiny, *PACE, "study=base", "save_at=[15]"])
    forked = train([*tiny, *PACE, f"fork={base}@15", "stability=clip03", "study=forked"])
    from_nothing = train([*tiny, *PACE, "stability=clip03", "study=whole"])
    assert forked.parent.name == f"{from_nothing.parent.name}@fork-15"
    assert record(forked)["config_hash"] != record(from_nothing)["config_hash"]
    assert record(forked)["acts_from"] == 15
    # The rate of a lower learning rate holds from the first step after the fork.
    lower = train([*tiny, *PACE, f"fork={base}@15", "stability=lower_lr", "study=lower"])
    rates = {int(line["step"]): line["lr"] for line in metrics(lower)}
    assert rates[16] == pytest.approx(0.3 * rates[15])


@pytest.mark.parametrize(
    ("source", "more"),
    [
        ((), ("recipe.learning_rate=1e-4",)),
        ((), ("recipe.batch_size=2",)),
        ((), ("guard.on_nonfinite=stop",)),
        (("stability=clip03",), ("stability=none",)),
        (("recipe.clip_norm=0.5",), ("recipe.clip_norm=1.0", "stability=warmdown")),
    ],
)
def test_a_fork_of_another_configuration_never_passes_for_a_run_from_nothing(source, more, tiny):
    base = made([*tiny, *PACE, "study=base", f"save_at=[{START}]", *source])
    forked = compose("train", [*tiny, *PACE, *more, f"fork={base}@{START}"])
    from_nothing = compose("train", [*tiny, *PACE, *more])
    assert forked.is_branch
    assert forked.variant_name.endswith(f"@fork-{START}")
    assert forked.config_hash() != from_nothing.config_hash()


def test_a_state_of_before_there_were_several_devices_is_a_beginning_as_any_other(tiny):
    base = made([*tiny, *PACE, "study=base", f"save_at=[{START}]"])
    config = yaml.safe_load((base / "config.yaml").read_text())
    del config["trainer"]["strategy"]
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    assert not compose("train", [*tiny, *PACE, f"fork={base}@{START}"]).is_branch


def test_a_kill_while_a_fork_begins_leaves_a_folder_that_is_as_good_as_new(tiny):
    base = made([*tiny, *PACE, "study=base", f"save_at=[{START}]"])
    arguments = [*tiny, *PACE, "stability=warmdown", f"fork={base}@{START}"]
    whole = train(arguments, "study=whole")
    torn = Path("runs/torn") / whole.parent.name / whole.name
    torn.mkdir(parents=True)
    (torn / ".forking").touch()
    (torn / "metrics.jsonl").write_text('{"step": 1, "train/loss"')
    assert_same(train(arguments, "study=torn"), whole)


def test_states_of_a_run_that_took_up_an_average_on_its_way_have_another_key(tiny, monkeypatch):
    arguments = [*tiny, *PACE, f"save_at=[{START}]"]
    config = compose("train", arguments)
    keys = {
        seen: state_key(config.config_hash(), observed, START)
        for seen, observed in (("nothing", {}), ("all", {"ema": EMA_FIELDS}))
    }
    assert len(set(keys.values())) == 2

    def key(study):
        (file,) = Path("runs", study).glob(f"*/seed-0/checkpoints/state-{START}.key")
        return file.read_text()

    train(arguments, EMA, "study=from-the-start")
    assert key("from-the-start") == keys["all"]
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert main([*arguments, "study=later"]) == 143
    assert main([*arguments, EMA, "study=later"]) == 0
    assert key("later") == keys["nothing"]


def test_a_state_that_two_states_of_the_code_have_trained_has_the_key_of_neither(tiny, monkeypatch):
    arguments = [*tiny, *PACE, f"save_at=[{START}]", "study=mixed"]
    plain = compose("train", arguments).config_hash()
    ours = code_digest()
    with monkeypatch.context() as patch:
        patch.setattr(start_fork, "code_digest", lambda: "older")
        stop_after(patch, 7)
        assert main(arguments) == 143
    assert main(arguments) == 0
    (file,) = Path("runs/mixed").glob(f"*/*/checkpoints/state-{START}.key")
    assert file.read_text() not in {state_key(plain, {}, START), ""}
    assert record(file.parents[1])["code"] == f"older+{ours}"
    assert record(train([*arguments, "study=pure"]))["code"] == ours


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["fork=nowhere@3"], r"fork=nowhere@3: nowhere is not a run folder"),
        (["fork=nowhere"], r"fork=nowhere: must be <run folder>@<step>"),
        (["fork={base}@7"], r"@7: no state is saved at that step \(saved: 15\)"),
        (["fork={base}@15", "seed=4"], r"seed is 0 in that run and 4 here"),
        (["fork={base}@15", "stability=qk_norm"], r"attention.qk_norm is False in that run"),
        (["fork={base}@15", "recipe.max_steps=30"], r"recipe.max_steps is 22 in that run"),
        (["fork={base}@15", "stability=early_stop"], r"must be before step 14, the run's last"),
        (["fork={base}@15", "stability=ema"], r"stability=ema must observe from the first step"),
        (["fork={base}@15", "resume=never"], r"resume=never: fork= starts from a state of its own"),
        (["save_at=[23]"], r"save_at=\[23\]: must be steps from 1 to 22"),
        (["validate_at=[23]"], r"validate_at=\[23\]: must be steps from 0 to 22"),
        (["observe={clip03:{norm:0.3}}"], r"observe=clip03: must be one of ema"),
        (["observe={ema:{decay:2.0,horizon_frac:null}}"], r"observe.ema.decay=2.0"),
        (["observe={ema:{rate:2.0}}"], r"observe.ema=.*: must have the fields decay, horizon_frac"),
        (["observe=ema"], r"observe=ema: must be"),
        (["observe=[1,2]"], r"observe=.*: must be"),
        (["observe={ema:{decay:a,horizon_frac:null}}"], r"observe.ema: .*'a'"),
        (["stability=ema", EMA], r"observe=ema: stability=ema is already on"),
    ],
)
def test_bad_forks_are_one_line(more, message, tiny, capsys):
    base = made([*tiny, *PACE, "study=base", "save_at=[15]"])
    arguments = [a.format(base=base) if a.startswith("fork") else a for a in more]
    assert main([*tiny, *PACE, "study=other", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") <= 2
    assert re.search(message, error), error
    assert not Path("runs/other").exists()
