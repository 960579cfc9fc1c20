"""Every field that can be configured says what it is, where it stands."""

import ast
from collections.abc import Iterator

import pytest

from tests.runs import ROOT


def fields() -> Iterator[tuple[str, bool]]:
    """Fields of the configuration's dataclasses, and whether a docstring follows."""
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Settings")):
                for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(
                        statement.annotation
                    ):
                        text = getattr(getattr(following, "value", None), "value", None)
                        name = f"{node.name}.{ast.unparse(statement.target)}"
                        yield name, isinstance(text, str)


@pytest.mark.parametrize(("name", "is_documented"), fields(), ids=lambda value: str(value))
def test_a_field_says_what_it_is(name, is_documented):
    assert is_documented
