import pytest
import yaml

from src.common.errors import InputError
from src.lab.book.files import study_named
from src.lab.remedies.failure_files import fits, read_failure, read_failures, sweeps_of
from src.stability import REMEDIES

CONTENT = {
    "shows_as": "loss",
    "says": "Something goes wrong.",
    "reports": "somewhere",
    "arguments": ["preset=no_warmup"],
    "healthy": ["recipe.warmup_frac=0.1"],
}


def written(tmp_path, **changes):
    file = tmp_path / "mine.yaml"
    content = {k: v for k, v in (CONTENT | changes).items() if v is not ...}
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_failure_is_tried_with_what_fits_it_and_without_its_cause(tmp_path):
    failure = read_failure(written(tmp_path))
    treated, healthy = sweeps_of(
        failure, remedies=["clip03", "router_eps", "fp32_full", "qk_norm"], seeds="0,1"
    )
    # A dense model has no router, and a run in float32 stays as it is in float32.
    assert treated == [
        "preset=no_warmup",
        "stability=none,shaken_full,clip03,qk_norm",
        "watch.incidents=false",
        "seed=0,1",
    ]
    assert healthy == [
        "preset=no_warmup",
        "recipe.warmup_frac=0.1",
        "stability=none",
        "watch.incidents=false",
        "seed=0,1",
    ]


def test_runs_that_go_non_finite_are_looked_at_as_they_come(tmp_path):
    given = written(tmp_path, shows_as="nonfinite", arguments=["preset=crash"])
    treated, healthy = sweeps_of(read_failure(given), remedies=["clip03"], seeds="range(20)")
    assert "sequential=true" in treated
    assert "sequential=true" not in healthy


def test_where_nothing_is_wrong_there_is_nothing_to_take_away(tmp_path):
    failure = read_failure(written(tmp_path, shows_as="nothing", healthy=[]))
    assert len(sweeps_of(failure, remedies=["clip03"], seeds="0")) == 1


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"shows_as": "pain"}, "shows_as=pain: must be one of nonfinite, loss, nothing"),
        ({"says": ...}, "must have the fields"),
        ({"remedy": "clip03"}, "must have the fields"),
        ({"arguments": "preset=dense"}, "arguments=preset=dense: must be a list"),
        ({"healthy": []}, "must say what takes the cause away"),
        ({"shows_as": "nothing"}, "be empty for shows_as=nothing"),
    ],
)
def test_a_file_that_says_too_little_or_too_much_is_refused(tmp_path, changes, told):
    with pytest.raises(InputError, match=r"mine\.yaml") as refused:
        read_failure(written(tmp_path, **changes))
    assert told in str(refused.value)


def test_a_repeat_has_seeds_of_its_own(tmp_path):
    failure = read_failure(written(tmp_path, repeats="no_warmup", seeds="range(3)"))
    treated, healthy = sweeps_of(failure, remedies=["clip03"], seeds="range(20)")
    assert failure.repeats == "no_warmup"
    assert treated[-1] == healthy[-1] == "seed=range(3)"


def test_a_repeat_of_a_failure_that_is_not_there_is_refused(tmp_path):
    (tmp_path / "failures").mkdir()
    written(tmp_path, repeats="no_wormup").rename(tmp_path / "failures" / "mine.yaml")
    with pytest.raises(InputError, match=r"mine repeats=no_wormup: must be one of mine"):
        read_failures(tmp_path, ["mine"])


def test_wrong_arguments_are_told_and_not_taken_for_remedies_that_do_not_fit(tmp_path):
    failure = read_failure(written(tmp_path, arguments=["preset=no_wormup"]))
    with pytest.raises(InputError, match="no_warmup"):
        sweeps_of(failure, remedies=["clip03"], seeds="0")


def test_the_study_knows_its_failures_and_its_remedies_are_registered():
    study = study_named("remedies")
    assert len(study.failures) == len(study.plan["of_failures"]["failures"])
    assert set(study.plan["of_failures"]["remedies"]) <= set(REMEDIES)
    files = {file.stem for file in (study.folder / "failures").glob("*.yaml")}
    assert files == {failure.name for failure in study.failures}


@pytest.mark.parametrize("remedy", study_named("remedies").plan["of_failures"]["remedies"])
def test_each_remedy_fits_one_of_the_failures(remedy):
    assert any(fits(failure.arguments, remedy) for failure in study_named("remedies").failures)
