"""Failures of training that people reported, rebuilt small; what `nonfinite` says of each."""

import re

import pytest

from src.lab.detector.public_cases.case_list import PUBLIC_CASES
from src.lab.detector.run_case import first_failure, incident_of


@pytest.mark.parametrize("case", PUBLIC_CASES, ids=lambda case: case.name)
def test_a_public_failure_is_explained(case, tmp_path):
    failure = first_failure(case)
    assert failure is not None, "the case itself does not fail"
    step, _ = failure
    assert case.step in (None, step), f"the case itself fails at {step}"
    incident = incident_of(case, tmp_path)
    assert incident is not None, "nothing was recorded"
    code = str((incident.get("source") or {}).get("code"))
    wrong = []
    if incident["step"] != step:
        wrong.append(f"step {incident['step']}, not {step}")
    if not re.search(case.cause, str(incident["cause"])):
        wrong.append(f"cause '{incident['cause']}', not '{case.cause}'")
    if case.line is not None and not re.search(case.line, code):
        wrong.append(f"line '{code}', not '{case.line}'")
    assert not wrong, "; ".join(wrong)
