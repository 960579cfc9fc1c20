"""What the laboratory book says is what its results say."""

import csv
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import pandas as pd
import pytest

from src.lab.book import book_charts
from src.lab.book.files import studies, study_named
from src.lab.book.page import TEMPLATE, Book
from src.lab.book.predictions import RIGHT, UNDECIDED, WRONG, predictions
from src.lab.book.single import FIGURE, single_runs
from src.study.analysis.frames import arms_frame
from src.study.read.collect import collect
from src.study.read.from_csv import read_frame
from src.study.report.make_report import write_report
from src.sweep.plan import make_plan
from src.train import main as train
from tests.runs import ROOT

STUDIES = sorted(path.parent for path in (ROOT / "experiments").glob("*/README.md"))

SWEPT = list(studies())

RUN = [study for study in SWEPT if study.has_results]

SINGLE = list(single_runs(ROOT / "experiments").values())

BOOK = Book()


@dataclass(frozen=True)
class Said:
    """What git says."""

    ok: bool
    stdout: str


def git(*arguments) -> Said:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return Said(ok=done.returncode == 0, stdout=done.stdout)


def has_history() -> bool:
    """Whether git is here with all commits."""
    found = git("rev-parse", "--is-shallow-repository")
    return found.ok and found.stdout.strip() == "false"


def unframed(svg):
    """A drawing without the size of its frame, which installed fonts can move by a pixel."""
    return re.sub(r'(width|viewBox)="[^"]*"', "", svg)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_every_study_says_how_it_is_repeated_and_has_its_results(study):
    text = (study / "README.md").read_text()
    for part in ("**Question.**", "**Command.**", "**Machine and cost.**", "**Answer.**"):
        assert part in text
    # One that has no runs of its own is computed from those of others.
    assert (study / "results.csv").is_file() or (study / f"README.md{TEMPLATE}").is_file()
    for drawing in (study / "figures").glob("*.svg"):
        assert drawing.name in text


@pytest.mark.parametrize("template", BOOK.templates(), ids=lambda file: file.parent.name)
def test_the_numbers_of_a_page_are_those_of_its_results(template):
    page = BOOK.target(template)
    assert page.read_text() == BOOK.page(template), "python -m src.lab book writes it again"


@pytest.mark.drawn
def test_the_chart_of_the_front_page_is_that_of_its_results():
    drawn = book_charts.front_chart(BOOK.measures(book_charts.FRONT_STUDY))
    assert unframed((BOOK.folder / book_charts.FRONT_CHART).read_text()) == unframed(drawn)


@pytest.mark.drawn
@pytest.mark.parametrize("study", RUN, ids=lambda study: study.name)
def test_the_charts_of_a_page_are_those_of_its_results(study):
    drawn = book_charts.study_charts(
        BOOK.measures(study.name), study.folder / f"README.md{TEMPLATE}"
    )
    lying = {f.name: unframed(f.read_text()) for f in (study.folder / "figures").glob("*")}
    assert lying == {name: unframed(text) for name, text in drawn.items()}


@pytest.mark.parametrize("study", RUN, ids=lambda study: study.name)
def test_the_arms_of_a_study_are_those_of_its_runs(study):
    measures = BOOK.measures(study.name)
    made = arms_frame(study.study, measures.analysis).replace("", None)
    # Another version of scipy rounds its quantiles otherwise.
    pd.testing.assert_frame_equal(
        read_frame(study.folder / "arms.csv"), made, rtol=1e-9, atol=1e-12, check_dtype=False
    )


@pytest.mark.parametrize("study", RUN, ids=lambda study: study.name)
def test_confirmatory_seeds_are_none_that_chose_a_setting(study):
    assert study.results["seed"].min() >= 1000


@pytest.mark.drawn
@pytest.mark.parametrize("run", SINGLE, ids=lambda run: run.name)
def test_the_chart_of_a_single_run_is_that_of_its_curve(run):
    assert unframed(book_charts.run_chart(run)) == unframed((run.folder / FIGURE).read_text())
    assert all(p.verdict(run.words) in (RIGHT, WRONG) for p in predictions(run.folder))


@pytest.mark.parametrize("study", [*SWEPT, *SINGLE], ids=lambda study: study.name)
@pytest.mark.skipif(
    not has_history(), reason="the history is not here: a shallow clone, an archive"
)
def test_predictions_are_older_than_results(study, tmp_path):
    """Later ones may only be added, and the results of their commit must not decide them."""

    def commits(name):
        path = f"experiments/{study.name}/{name}"
        return git("log", "--format=%H", "--", path).stdout.split()

    predictions(study.folder)
    if not study.has_results or not (committed := commits("results.csv")):
        return
    said = commits("predictions.yaml")
    assert git("diff", "--quiet", "HEAD", "--", str(study.folder / "predictions.yaml")).ok
    first = committed[-1]
    assert first not in said
    later = [each for each in said if not git("merge-base", "--is-ancestor", each, first).ok]
    assert len(later) < len(said)
    for commit in later:
        assert not added_after_the_fact(study, commit, tmp_path / commit)


def added_after_the_fact(study, commit, folder):
    """What a commit says of a study that could be known then: changes, and decided predictions."""
    shutil.copytree(study.folder, folder / study.name)
    for name in ("predictions.yaml", "results.csv"):
        at = git("show", f"{commit}:experiments/{study.name}/{name}").stdout
        (folder / study.name / name).write_text(at)
    now = predictions(folder / study.name)
    words = Book(folder).words(study.name)
    before = git("show", f"{commit}~1:experiments/{study.name}/predictions.yaml").stdout
    (folder / study.name / "predictions.yaml").write_text(before)
    known = predictions(folder / study.name)
    assert [each for each in now if each in known] == known
    return [p.says for p in now if p not in known and p.verdict(words) != UNDECIDED]


@functools.cache
def swept_variants(name):
    """What each sweep of a study trains."""
    variants = []
    for sweep in study_named(name).sweeps():
        # One seed of every arm: the others differ in it alone, and take long to compose.
        one = ["seed=1000", "repeat=0", "sequential=false", "tracking=local"]
        plan = make_plan("train", [*sweep, *one])
        assert plan.study == name
        variants.append({cell.config.variant_name for cell in plan.cells})
    return variants


def sweeps_to_come(study):
    """How many sweeps of a study have no results yet: those are committed as they come."""
    if study.failures:
        return len(BOOK.measures(study.name).failures_to_come())
    found = set(study.results["variant"])
    return sum(not variants & found for variants in swept_variants(study.name))


@pytest.mark.parametrize("study", RUN, ids=lambda study: study.name)
def test_the_predictions_of_a_study_that_was_run_are_decided(study, tmp_path, monkeypatch):
    words = BOOK.words(study.name)
    monkeypatch.chdir(tmp_path)
    for prediction in predictions(study.folder):
        others = re.findall(r"other\('(\w+)'\)", prediction.measure)
        if all((BOOK.folder / other / "results.csv").is_file() for other in others):
            is_decided = prediction.verdict(words) in (RIGHT, WRONG)
            # Composing the sweeps takes long, and says only whether an answer may be missing.
            assert is_decided or sweeps_to_come(study), prediction.says


@pytest.mark.parametrize("study", RUN, ids=lambda study: study.name)
def test_a_study_that_cannot_rank_remedies_says_so_wherever_it_is_read(study):
    marked = not BOOK.measures(study.name).can_rank()
    page = " ".join((study.folder / "README.md").read_text().split())
    assert ("this study cannot rank remedies" in page) == marked
    for name in ("README.md", "CLAIMS.md"):
        text = (BOOK.folder / name).read_text()
        link = f"[{study.name}]({study.name}/README.md)"
        assert text.count(f"{link} (cannot rank remedies)") == (text.count(link) if marked else 0)


PAGES = [
    *(ROOT / "experiments").rglob("*.md"),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "src/nonfinite/README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_links_to_what_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


COMPOSED = [
    # The arms of a study of failures take a minute to compose.
    pytest.param(study, marks=pytest.mark.slow if study.failures else (), id=study.name)
    for study in SWEPT
]


@pytest.mark.parametrize("study", COMPOSED)
def test_the_sweeps_of_a_study_compose(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweeps = swept_variants(study.name)
    if study.has_results:
        found = set(study.results["variant"])
        # A sweep has all its results or none yet.
        assert found == set().union(*(variants for variants in sweeps if variants & found))


def run_short(study, folder):
    """Two seeds of a few steps, and what the book would make of them."""
    for sweep in study.sweeps(short=True):
        assert train(["--multirun", *sweep, "tracking=local"]) == 0
    report = write_report(collect(Path("runs"), study.name), show=False).page.parent
    for name in ("predictions.yaml", "study.yaml"):
        (folder / study.name).mkdir(parents=True, exist_ok=True)
        (folder / study.name / name).write_text((study.folder / name).read_text())
    if (study.folder / "failures").is_dir():
        shutil.copytree(study.folder / "failures", folder / study.name / "failures")
    (folder / study.name / "results.csv").write_text((report / "report.csv").read_text())


@pytest.mark.parametrize(
    "name", ["control", *(pytest.param(s.name, marks=pytest.mark.slow) for s in SWEPT)]
)
def test_a_short_version_of_a_study_runs_and_can_be_judged(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = study_named(name)
    run_short(study, tmp_path / "book")
    book = Book(tmp_path / "book")
    variants = set(book.measures(name).folder.results["variant"])
    if study.has_results:
        # All its arms are arms of the whole study, but for the fields that shorten it.
        assert len(variants) <= len(set(study.results["variant"]))
        short = {variant.split("@")[0] for variant in variants}
        assert short == {variant.split("@")[0] for variant in study.results["variant"]}
    for prediction in predictions(study.folder):
        # What it compares with another study's has no runs here; all else can be asked.
        if "other(" not in prediction.measure:
            prediction.found(book.words(name))


ARMS = {
    "scratch": "sizes alone",
    "exact": "exact",
    "kv96": "kv96",
    "kv48": "kv48",
    "kv24": "kv24",
}


@pytest.mark.parametrize(("study", "num_seeds"), [("convert", 6), ("convert_smollm2", 2)])
def test_the_numbers_of_conversions_are_those_of_their_results(study, num_seeds):
    with (ROOT / "experiments" / study / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "experiments" / study / "README.md").read_text()
    losses = {}
    for name, label in ARMS.items():
        own = [row for row in rows if row["init"] == f"models/{study}/{name}"]
        assert len(own) == num_seeds
        before, losses[name] = (
            [float(row[key]) for row in own] for key in ("initial_loss", "loss")
        )
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {label}")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[4] == f"{int(own[0]['cache_bytes_per_token']):,}"
        assert cells[5] == f"{fmean(before):.3f}" and cells[6] == f"{fmean(losses[name]):.3f}"
    for name in ("exact", "kv96", "kv48", "kv24"):
        assert all(one > other for one, other in zip(losses["scratch"], losses[name], strict=True))
    gaps = {name: fmean(losses[name]) - fmean(losses["exact"]) for name in losses}
    if study == "convert":
        assert 0.21 <= round(gaps["scratch"], 2) <= 0.22
    else:
        assert [round(gaps[name], 2) for name in ("kv96", "kv24")] == [0.26, 0.63]
        for pair in zip(*(losses[name] for name in ("exact", "kv96", "kv48", "kv24")), strict=True):
            assert list(pair) == sorted(pair)


def test_the_numbers_of_detector_are_those_of_its_results():
    with (ROOT / "experiments" / "detector" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    text = (ROOT / "experiments" / "detector" / "README.md").read_text()
    unseen = [row for row in rows if row["half"] == "unseen"]
    healthy = [row for row in unseen if row["kind"] == "healthy"]
    failed = [row for row in unseen if row["kind"] != "healthy" and row["first_nonfinite"]]
    assert f"| false alarms in healthy runs | 0 of {len(healthy)} |" in text
    assert not any(row["alarm_step"] or row["first_nonfinite"] for row in healthy)
    right = [row["cause_right"] for row in failed]
    assert f"| cause right | {right.count('True')} of {len(failed)} |" in text
    leads: dict[str, list[int]] = {}
    for row in failed:
        if row["kind"] == "drift":
            lead = int(row["first_nonfinite"]) - int(row["alarm_step"] or row["first_nonfinite"])
            leads.setdefault(row["case"], []).append(lead)
    every = [lead for case in leads.values() for lead in case]
    warned = sum(lead > 0 for lead in every)
    assert f"| drifting failures warned of | {warned} of {len(every)} |" in text
    assert (
        f"| median lead, share of the run | {median(every) / 130:.0%} |".replace("%", " %") in text
    )
    for case, own in leads.items():
        assert f"| {case} | {len(own)} of 6 | {median(own):g} |" in text


def test_the_ratios_of_speed_are_those_of_its_results():
    folder = ROOT / "experiments" / "speed"
    text = (folder / "README.md").read_text()
    with (folder / "results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["measured_by"] == "peers script"]

    def best(rows, name, column="value", pick=max):
        """Ours over the best of the others."""
        ours = next(float(row[column]) for row in rows if row["name"] == name)
        others = [float(r[column]) for r in rows if r["name"] not in (name, "floor")]
        return ours / pick(others)

    for shape in ("proxy", "mid"):
        for cell in ("gqa+mlp", "mlha+moe"):
            here = [r for r in rows if (r["shape"], r["cell"]) == (shape, cell)]
            for kind in ("eager", "compiled"):
                steps = [
                    r
                    for r in here
                    if r["task"] == "step" and r["name"].endswith("compiled") == (kind != "eager")
                ]
                name = "ours" if kind == "eager" else "ours compiled"
                line = next(x for x in text.splitlines() if f"{kind} step, {shape}, {cell}" in x)
                assert f"{best(steps, name):.2f}" in line
                assert (
                    f"{next(float(r['of_floor']) for r in steps if r['name'] == name):.2f}" in line
                )
            if shape == "mid":
                decoding = [r for r in here if r["task"] == "decode"]
                line = next(x for x in text.splitlines() if f"greedy decoding, mid, {cell}" in x)
                assert f"{best(decoding, 'ours'):.2f}" in line
    memory = next(x for x in text.splitlines() if "peak memory, proxy" in x)
    for cell in ("gqa+mlp", "mlha+moe"):
        here = [
            r
            for r in rows
            if (r["shape"], r["cell"], r["task"]) == ("proxy", cell, "step")
            and not r["name"].endswith("compiled")
        ]
        assert f"{best(here, 'ours', 'peak_mib', min):.2f}" in memory
