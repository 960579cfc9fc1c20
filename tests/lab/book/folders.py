"""A book of one study that no one has trained."""

from pathlib import Path

import yaml

from src.lab.book.files import StudyFolder
from src.study.report.make_report import write_report
from tests.study import synthetic
from tests.study.synthetic import Arm

ARMS = {
    "none": Arm(num_failing=6),
    "shaken": Arm(num_failing=5, first=310, acts_from=240),
    "router_eps": Arm(acts_from=240),
    "warmdown": Arm(num_failing=6, acts_from=240),
}


def study_folder(tmp_path: Path, arms=ARMS, *, predictions=(), page="", name="one") -> StudyFolder:
    """experiments/<name> with results of such arms."""
    folder = tmp_path / "experiments" / name
    folder.mkdir(parents=True)
    study = synthetic.study(tmp_path, arms=arms, seeds=6, name=name)
    report = write_report(study, tmp_path / "report", show=False).page.parent
    (folder / "results.csv").write_bytes((report / "report.csv").read_bytes())
    plan = {"sweeps": [["experiment=stability"]], "short": ["seed=1000,1001"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(plan))
    (folder / "predictions.yaml").write_text(yaml.safe_dump(list(predictions)))
    if page:
        (folder / "README.md.jinja").write_text(page)
    return StudyFolder(folder=folder)
