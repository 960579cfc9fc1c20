import pytest

from src.common.errors import InputError
from src.lab.book.page import BEGIN, END, Book
from tests.lab.book.folders import study_folder
from tests.study.synthetic import Arm

PAGE = """{{ failing('none') }} of {{ seeds('none') }}, p {{ p_value('router_eps') | p }}

{{ arms_table('non-finite runs') }}

{{ predictions_table() }}
"""


def test_a_page_says_what_the_results_say(tmp_path):
    predicted = [{"says": "it fails", "measure": "failing('none')", "at_least": 6}]
    study_folder(tmp_path, predictions=predicted, page=PAGE)
    book = Book(tmp_path / "experiments")
    (template,) = book.templates()
    text = book.page(template)
    assert text.startswith("6 of 6, p = 0.00")
    assert "| arm | non-finite runs |\n|---|--:|\n" in text
    assert "| it fails | at least 6 | 6 | right |" in text
    assert text.endswith("|\n")


def test_paragraphs_are_wrapped_and_nothing_else_is(tmp_path):
    page = "# {{ seeds('none') }}\n\n" + "word " * 50 + "\n\n| a |\n|---|\n| b |\n\nend\n"
    study_folder(tmp_path, page=page)
    book = Book(tmp_path / "experiments")
    lines = book.page(book.templates()[0]).splitlines()
    assert lines[0] == "# 6" and lines[-5:] == ["| a |", "|---|", "| b |", "", "end"]
    assert max(map(len, lines)) <= 120 and len(lines[2]) > 100


def test_the_front_page_changes_between_its_marks_alone(tmp_path):
    study_folder(tmp_path)
    front = tmp_path / "experiments" / "front.md.jinja"
    front.write_text("{{ study('one').failing('none') }} fail.\n")
    (tmp_path / "README.md").write_text(f"# Name\n\n{BEGIN}\nold\n{END}\n\nrest\n")
    book = Book(front.parent)
    assert book.target(front) == tmp_path / "README.md"
    assert book.page(front) == f"# Name\n\n{BEGIN}\n\n6 fail.\n\n{END}\n\nrest\n"


@pytest.mark.parametrize("text", ["", f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{BEGIN}{END}"])
def test_a_front_page_without_its_marks_is_left_as_it_is(text, tmp_path):
    study_folder(tmp_path)
    front = tmp_path / "experiments" / "front.md.jinja"
    front.write_text("new\n")
    (tmp_path / "README.md").write_text(f"# Name\n{text}rest\n")
    with pytest.raises(InputError, match="once and in this order"):
        Book(front.parent).page(front)


def test_a_page_of_the_book_speaks_of_any_study(tmp_path):
    study_folder(tmp_path)
    file = tmp_path / "experiments" / "README.md.jinja"
    file.write_text("{{ study('one').failing('none') }} {{ studies }}\n")
    assert Book(file.parent).page(file) == "6 ['one']\n"


@pytest.mark.parametrize("num_failing", [0, 5])
def test_a_link_says_that_a_study_cannot_rank_remedies(num_failing, tmp_path):
    arms = {"none": Arm(num_failing=6), "router_eps": Arm(num_failing=num_failing, acts_from=240)}
    study_folder(tmp_path, arms, page="{{ can_rank() }}\n")
    file = tmp_path / "experiments" / "README.md.jinja"
    file.write_text("{{ link('one') }}\n\n{{ rank_note('one') }}\n")
    note = " (cannot rank remedies)" if num_failing else ""
    assert Book(file.parent).page(file) == f"[one](one/README.md){note}\n\n{note}\n"


def test_a_study_that_has_not_been_run_has_no_page_yet(tmp_path):
    folder = study_folder(tmp_path, page=PAGE)
    (folder.folder / "results.csv").unlink()
    assert Book(tmp_path / "experiments").templates() == []


def test_a_page_that_needs_others_waits_for_them(tmp_path):
    study_folder(tmp_path)
    page = tmp_path / "experiments" / "floor" / "README.md.jinja"
    page.parent.mkdir()
    page.write_text("{# needs: one, two #}\n{{ study('one').failing('none') }}\n")
    book = Book(tmp_path / "experiments")
    assert book.templates() == []
    page.write_text("{# needs: one #}\n{{ study('one').failing('none') }}\n")
    assert book.templates() == [page] and book.page(page) == "6\n"


@pytest.mark.parametrize("asked", ["{{ nothing }}", "{{ mean_loss('clip03') }}", "{% if %}"])
def test_what_a_page_cannot_know_is_one_line(asked, tmp_path):
    study_folder(tmp_path, page=asked)
    book = Book(tmp_path / "experiments")
    with pytest.raises(InputError, match=r"README\.md\.jinja: ") as caught:
        book.page(book.templates()[0])
    assert "\n" not in str(caught.value)
