import pytest
import yaml

from src.lab.book.page_words import Measures
from src.lab.book.predictions import RIGHT, UNDECIDED, WRONG, predictions
from tests.lab.book.folders import study_folder


def said(measure, **bound):
    return {"says": "so", "measure": measure, **bound}


@pytest.mark.parametrize(
    ("measure", "bound", "verdict"),
    [
        ("failing('none')", {"at_least": 6}, RIGHT),
        ("failing('none')", {"above": 6}, WRONG),
        ("failing('none') - failing('shaken')", {"within": [1, 2]}, RIGHT),
        ("abs(difference('router_eps', 'nonfinite_batches'))", {"at_most": 18}, WRONG),
        ("median_first('router_eps')", {"below": 1}, UNDECIDED),
        ("failing('none') / failing('router_eps')", {"below": 1}, UNDECIDED),
    ],
)
def test_a_prediction_is_held_against_the_results(measure, bound, verdict, tmp_path):
    folder = study_folder(tmp_path, predictions=[said(measure, **bound)])
    (prediction,) = predictions(folder.folder)
    assert prediction.verdict(Measures(folder, others={}.__getitem__).words()) == verdict


@pytest.mark.parametrize("entry", [{"says": "so", "measure": "1"}, said("1", below=1, above=0)])
def test_a_prediction_has_one_bound(entry, tmp_path):
    (tmp_path / "predictions.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(ValueError, match="must have says, measure and one of"):
        predictions(tmp_path)


def test_a_prediction_runs_no_code(tmp_path):
    folder = study_folder(tmp_path, predictions=[said("failing.__globals__", at_least=0)])
    (prediction,) = predictions(folder.folder)
    with pytest.raises(Exception, match=r"unsafe|__globals__"):
        prediction.verdict(Measures(folder, others={}.__getitem__).words())
