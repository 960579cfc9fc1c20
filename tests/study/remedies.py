"""A study of remedies in which all seeds fail and one arm is a cure."""

from src.study.analysis.results import Analysis, ArmResult
from tests.study.synthetic import Arm

START = 240

FAILS = [[380, 383], [301], [360, 361, 362], [351], [258, 300], [390]]
"""Non-finite steps of the baseline a seed: six of six, all after the landmark."""

SHAKEN = [[375], [302, 303], [], [355], [258], [391]]

REMEDIES = {
    "none": Arm(nonfinite=FAILS),
    "shaken": Arm(nonfinite=SHAKEN, acts_from=START),
    "router_eps": Arm(acts_from=START),
    "clip03": Arm(nonfinite=[*FAILS[1:], FAILS[0]]),
    "fp32": Arm(nonfinite=[*FAILS[2:], *FAILS[:2]], acts_from=START),
    "noise": Arm(nonfinite=SHAKEN, acts_from=START),
    "warmdown": Arm(nonfinite=[*FAILS[:3], [], [], []], acts_from=START),
    "early_stop": Arm(acts_from=280, steps=280),
}


def arm(analysis: Analysis, label: str) -> ArmResult:
    (found,) = [each for each in analysis.arms if each.label == label]
    return found


def everything_said(analysis: Analysis) -> str:
    verdicts = [c.verdict for each in analysis.arms for c in each.comparisons.values()]
    return "\n".join([*analysis.answer, *analysis.warnings, *verdicts])
