"""A book of one study that no one has trained."""

import copy
from pathlib import Path

import pandas as pd
import yaml

from src.lab.book.files import StudyFolder
from src.study.analysis.analyse import analyse
from src.study.analysis.frames import runs_frame
from src.study.read.from_csv import write_frame
from tests.study import synthetic
from tests.study.synthetic import Arm

ARMS = {
    "none": Arm(num_failing=6),
    "shaken": Arm(num_failing=5, first=310, acts_from=240),
    "router_eps": Arm(acts_from=240),
    "warmdown": Arm(num_failing=6, acts_from=240),
}


_FRAMES: dict[str, pd.DataFrame] = {}


def results_of(arms) -> pd.DataFrame:
    """The lines of report.csv of a study of such arms, made once a worker.

    tests/study/test_report.py holds the file against `runs_frame`; its charts are nobody's here.
    """
    key = repr(arms)
    if key not in _FRAMES:
        study = synthetic.in_memory(arms, seeds=6, name="one")
        _FRAMES[key] = runs_frame(study, analyse(study))
    return copy.deepcopy(_FRAMES[key])


def study_folder(tmp_path: Path, arms=ARMS, *, predictions=(), page="") -> StudyFolder:
    """experiments/one with results of such arms."""
    folder = tmp_path / "experiments" / "one"
    folder.mkdir(parents=True)
    write_frame(results_of(arms), folder / "results.csv")
    plan = {"sweeps": [["experiment=stability"]], "short": ["seed=1000,1001"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    (folder / "predictions.yaml").write_text(yaml.safe_dump(list(predictions)))
    if page:
        (folder / "README.md.jinja").write_text(page)
    return StudyFolder(folder=folder)
