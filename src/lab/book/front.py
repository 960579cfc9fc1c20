"""The figure of the project's front page: the headline study, the arms that tell its story."""

from dataclasses import replace

from src.lab.book.measures import Measures
from src.study.analysis.results import Analysis
from src.study.report import figures
from src.study.report.svg import Drawing

STUDY = "stability"

FILE = "figures/front.svg"
"""Below experiments/."""

ARMS = {
    "none": "as published",
    "clip03": "clip to 0.3",
    "warmdown": "rate warmdown",
    "noise": "gradient noise",
    "lower_lr": "lower rate",
    "shaken_full": "chance alone",
    "router_eps": "epsilon in gate",
}
"""Options, and what they are called there."""


def front_figure(measures: Measures) -> Drawing:
    """Non-finite batches of every seed."""
    arms = [replace(measures.one(name), label=label) for name, label in ARMS.items()]
    chosen = Analysis(study=STUDY, arms=arms, answer=[], can_rank=True, warnings=[])
    return figures.failures(measures.folder.study, chosen)
