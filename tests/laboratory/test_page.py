import pytest

from src.errors import InputError
from src.laboratory.page import Book
from tests.laboratory.folders import study_folder

PAGE = """{{ failing('none') }} of {{ seeds('none') }}, p = {{ p_value('router_eps') | p }}

{{ arms_table('non-finite seeds') }}

{{ predictions_table() }}
"""


def test_a_page_says_what_the_results_say(tmp_path):
    predicted = [{"says": "it fails", "measure": "failing('none')", "at_least": 6}]
    study_folder(tmp_path, predictions=predicted, page=PAGE)
    book = Book(tmp_path / "experiments")
    (template,) = book.templates()
    text = book.page(template)
    assert text.startswith("6 of 6, p = 0.00")
    assert "| arm | non-finite seeds |\n|---|--:|\n" in text
    assert "| it fails | at least 6 | 6 | right |" in text
    assert text.endswith("|\n")


def test_a_page_of_the_book_speaks_of_any_study(tmp_path):
    study_folder(tmp_path)
    file = tmp_path / "experiments" / "README.md.jinja"
    file.write_text("{{ study('one').failing('none') }} {{ studies }}\n")
    assert Book(file.parent).page(file) == "6 ['one']\n"


def test_a_study_that_has_not_been_run_has_no_page_yet(tmp_path):
    folder = study_folder(tmp_path, page=PAGE)
    (folder.folder / "results.csv").unlink()
    assert Book(tmp_path / "experiments").templates() == []


@pytest.mark.parametrize("asked", ["{{ nothing }}", "{{ mean_loss('clip03') }}", "{% if %}"])
def test_what_a_page_cannot_know_is_one_line(asked, tmp_path):
    study_folder(tmp_path, page=asked)
    book = Book(tmp_path / "experiments")
    with pytest.raises(InputError, match=r"README\.md\.jinja: ") as caught:
        book.page(book.templates()[0])
    assert "\n" not in str(caught.value)
