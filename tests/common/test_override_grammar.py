"""What is done to arguments before Hydra reads them."""

from src.common.override_grammar import join_braces


def test_braces_that_a_shell_took_apart_are_put_together():
    typed = ["a=1", "kwargs=layers:2", "b=2", "kwargs=heads:4", "model.kwargs=x:1"]
    assert join_braces(typed) == ["a=1", "kwargs={layers:2,heads:4}", "b=2", "model.kwargs={x:1}"]


def test_other_values_are_left_alone():
    typed = ["kwargs={layers:2}", "kwargs=null", "tracking.uri=http://host:80", "data.path=c:x"]
    assert join_braces(typed) == typed
