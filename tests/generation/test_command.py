"""`python -m src.generate` as a user types it."""

import io
import json
import subprocess
import sys

import pytest
import torch

from src.checkpoint.trained_model import load_trained
from src.data.tokenizer import ByteTokenizer
from src.generate import main
from src.generation.prompts import WRITEUP
from src.generation.stream import TextStream
from tests.conftest import TINY
from tests.runs import ROOT, assert_same_tree, last_checkpoint, train

ODD = "O, Romeo: \"thou\" {[art]} ${now} = 'x' ~!\\ ; \n- it's\\'"


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache):
    """A run with averaged weights and a vocabulary of bytes."""
    patch = pytest.MonkeyPatch()
    patch.chdir(tmp_path_factory.mktemp("generate"))
    folder = train(
        [
            *TINY,
            f"paths.cache={shared_cache}",
            "tokenizer=byte",
            "stability=ema",
            "recipe.seq_len=64",
        ]
    )
    patch.undo()
    return folder if folder.is_absolute() else tmp_path_factory.getbasetemp() / "generate0" / folder


def said(capsys, *arguments) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def answered(capsys, *arguments):
    return json.loads(said(capsys, *arguments, "format=json"))


@pytest.mark.parametrize("prompt", ["null", "-", "[a,b]", "'quoted'", "a,b", "1e3", ODD])
def test_a_prompt_is_taken_as_it_is_typed(run, prompt, capsys):
    (sample,) = answered(capsys, f"run={run}", f"prompt={prompt}", "max_new_tokens=1")["samples"]
    assert sample["prompt"] == prompt
    assert sample["text"].startswith(prompt)


def test_without_a_prompt_it_continues_the_five_of_the_writeup(run, capsys):
    answer = answered(capsys, f"run={run}", "max_new_tokens=4")
    assert [sample["prompt"] for sample in answer["samples"]] == list(WRITEUP)
    assert all(len(sample["tokens"]) == 4 for sample in answer["samples"])
    text = said(capsys, f"run={run}", "max_new_tokens=4")
    assert all(f"--- {prompt}\n{prompt}" in text for prompt in WRITEUP)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(run, capsys):
    arguments = [f"run={run}", "prompt=The", "max_new_tokens=30"]
    assert said(capsys, *arguments) == said(capsys, *arguments)
    assert said(capsys, *arguments, "seed=1") != said(capsys, *arguments)
    greedy = [*arguments, "temperature=0"]
    assert said(capsys, *greedy) == said(capsys, *greedy, "seed=1")


def test_what_is_streamed_is_what_json_says(run, capsys):
    arguments = [f"run={run}", "prompt=The", "max_new_tokens=30"]
    (sample,) = answered(capsys, *arguments)["samples"]
    assert said(capsys, *arguments) == sample["text"] + "\n"


def test_the_weights_are_the_checkpoints_raw_or_averaged(run):
    saved = last_checkpoint(run)
    (state,) = (s for s in saved["callbacks"].values() if "shadow_params" in s)
    raw, averaged = (load_trained(run, weights=name, field="run").model for name in ("raw", "ema"))
    assert_same_tree([p.detach() for p in averaged.parameters()], state["shadow_params"])
    for name, weight in raw.state_dict().items():
        assert torch.equal(weight, saved["state_dict"][f"model.{name}"])
    assert not torch.equal(raw.head.weight, averaged.head.weight)


def test_a_checkpoint_serves_as_its_folder_does(run, capsys):
    arguments = ["prompt=The", "max_new_tokens=10"]
    by_folder = said(capsys, f"run={run}", *arguments)
    assert said(capsys, f"run={run / 'checkpoints' / 'last.ckpt'}", *arguments) == by_folder


def test_prompts_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts").write_text("First, it\nSecond: {that}\n")
    typed = [f"run={run}", "max_new_tokens=5"]
    by_file = answered(capsys, *typed, f"prompts_file={tmp_path / 'prompts'}")
    monkeypatch.setattr("sys.stdin", io.StringIO("First, it\nSecond: {that}\n"))
    by_input = answered(capsys, *typed, "prompts_file=-")
    assert [s["prompt"] for s in by_file["samples"]] == ["First, it", "Second: {that}"]
    assert by_file["samples"] == by_input["samples"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt="], "prompt=: is empty"),
        (["prompt=a", "prompts_file=b"], "prompts_file=b: type prompts_file or prompt, not both"),
        (["prompts_file=nowhere"], "prompts_file=nowhere: cannot be read"),
        (["prompt=" + "a" * 300], "has 300 tokens; the model's context is"),
        (["temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["temperature=null"], "temperature=null: must be a number"),
        (["top_k=1.5"], "top_k=1.5: must be an integer"),
        (["top_p=0"], "top_p=0.0: must be above 0"),
        (["max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (["weights=best"], "weights=best: must be one of raw, ema"),
        (["format=xml"], "format=xml: must be one of text, json"),
        (["run=nowhere"], "run=nowhere: no such run folder or checkpoint"),
        (["temperatur=1"], "temperatur: unknown field; did you mean temperature?"),
    ],
)
def test_bad_input_is_one_line(run, arguments, message, capsys):
    assert main([f"run={run}", *arguments]) == 2
    captured = capsys.readouterr()
    said_wrong = captured.err + captured.out
    assert message in said_wrong.replace("\n", " ")
    assert "Traceback" not in said_wrong


def test_an_empty_line_of_a_file_is_named(run, tmp_path, capsys):
    file = tmp_path / "prompts"
    file.write_text("a\n\nb\n")
    assert main([f"run={run}", f"prompts_file={file}"]) == 2
    assert ", line 2: is empty" in capsys.readouterr().err.replace("\n", "")
    file.write_text("")
    assert main([f"run={run}", f"prompts_file={file}"]) == 2


def test_a_run_without_averages_a_damaged_checkpoint_and_a_strange_folder(tiny, tmp_path, capsys):
    plain = train([*tiny])
    assert main([f"run={plain}", "weights=ema"]) == 2
    assert "has no averaged weights" in capsys.readouterr().err.replace("\n", " ")
    assert main([f"run={tmp_path}"]) == 2
    assert "is not a run folder" in capsys.readouterr().err.replace("\n", " ")
    (plain / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    assert main([f"run={plain}"]) == 2
    assert "is damaged or not a checkpoint" in capsys.readouterr().err.replace("\n", " ")
    # The vocabulary of characters that the corpus lacks.
    assert main([f"run={train([*tiny, 'study=other'])}", "prompt=é"]) == 2
    assert "character 'é': not among" in capsys.readouterr().err.replace("\n", " ")


def test_reading_a_checkpoint_runs_no_code(run, tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    content = last_checkpoint(run) | {"tokenizer": Evil()}
    torch.save(content, tmp_path / "evil.ckpt")
    assert main([f"run={tmp_path / 'evil.ckpt'}"]) == 2


def test_bytes_of_a_character_wait_for_its_end():
    written: list[str] = []
    stream = TextStream([*b"a"], ByteTokenizer(), write=written.append)
    for byte in "é!".encode():
        stream.add(0, byte)
    stream.add(0, "é".encode()[0])
    stream.finish()
    assert "".join(written) == "aé!\N{REPLACEMENT CHARACTER}"
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(written[:-1])


def test_it_works_from_a_shell_without_the_training_stack(run):
    command = [sys.executable, "-m", "src.generate", f"run={run}", "prompt=Hm", "max_new_tokens=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hm")
