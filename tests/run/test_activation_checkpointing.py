"""trainer.activation_checkpointing=true: less memory, and the same run."""

from src.config.compose import compose
from src.train import main
from tests.nonfinite.test_recorder import FAILING
from tests.runs import assert_same_tree, metrics, record, train, weights

ON = "trainer.activation_checkpointing=true"


def test_a_run_is_bitwise_the_same_and_has_the_same_name_and_hash(tiny):
    watched = ("watch.activations_every=2", "watch.gradients_every=2", "recipe.accumulate=2")
    plain = train(tiny, *watched)
    again = train(tiny, *watched, ON, "study=again")
    assert metrics(plain) == metrics(again)
    assert_same_tree(weights(plain), weights(again))
    assert plain.relative_to("runs/single") == again.relative_to("runs/again")
    one, two = compose("train", [*tiny]), compose("train", [*tiny, ON])
    assert one.config_hash() == two.config_hash()


def test_the_operation_that_failed_is_named_as_without_it(tiny):
    incidents = []
    for number, more in enumerate(([], [ON])):
        own = ["model.num_layers=2", f"study=number-{number}", *more]
        incidents.append(record(train(tiny, *FAILING, *own))["incident"])
    assert incidents[0]["cause"] == "router underflow"
    assert incidents[0] == incidents[1]


def test_what_it_does_not_go_with_is_refused(tiny, capsys):
    assert main([*tiny, ON, "compile=true"]) == 2
    assert "needs compile=false" in capsys.readouterr().err
    external = ["model=external", "model.target=src.examples.mlp:MLPLanguageModel", "preset=smoke"]
    assert main([*external, ON]) == 2
    assert "works with built-in models only" in capsys.readouterr().err
    assert main([*tiny, ON, "compile=auto"]) == 2
    assert "needs compile=false" in capsys.readouterr().err
