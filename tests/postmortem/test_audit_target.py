"""`python -m src.audit`: what it prints, what it saves, and how it answers mistakes."""

import json
import sys

import pytest
import torch

from src.audit import main
from src.train import main as train

MODELS = """
import torch
from torch import nn


class Router(nn.Module):
    def __init__(self, eps=0.0):
        super().__init__()
        self.table, self.gate, self.eps = nn.Embedding(20, 32), nn.Linear(32, 4), eps
        self.head = nn.Linear(32, 20)

    def forward(self, ids):
        hidden = nn.functional.layer_norm(self.table(ids), (32,))
        score = self.gate(hidden).sigmoid().topk(2, dim=-1)[0]
        share = score / (score.sum(-1, keepdim=True) + self.eps)
        return self.head(hidden * share.sum(-1, keepdim=True))


def other():
    torch.manual_seed(7)
    model = Router(eps=1.0)
    model.head.weight.data.fill_(3e38)
    return model


class Ratio(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, y):
        return (self.layer(x) / y).mean()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "audited_models.py").write_text(MODELS)
    yield tmp_path
    sys.modules.pop("audited_models", None)


ROUTER = ("target=audited_models:Router", "dtype=float32")


def test_a_router_is_found_and_its_witness_runs_again(folder, capsys):
    assert main([*ROUTER]) == 1
    out = capsys.readouterr().out
    assert "audited_models:Router: NaN or Inf reached at 1 place" in out
    assert "share = score / (score.sum(-1, keepdim=True) + self.eps)" in out
    assert "   in the top-level module (forward); float32" in out
    assert "step.model" not in out
    file = folder / "audit" / "witness-1-float32.pt"
    assert f"witness={file.relative_to(folder)}" in out
    again = ["target=audited_models:Router", f"witness={file}"]
    assert main(again) == 1
    out = capsys.readouterr().out
    assert "the operation of the witness" in out
    assert "step.model" not in out
    assert main([*again, "kwargs={eps:1e-20}"]) == 0
    assert "the witness fails no longer" in capsys.readouterr().out


def test_a_witness_is_not_judged_on_other_weights(folder, capsys):
    main([*ROUTER])
    capsys.readouterr()
    assert main(["target=audited_models:other", "witness=audit/witness-1-float32.pt"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1
    assert "audited_models:other has other weights than the audited model (" in error
    assert "its answer says nothing of this witness; call torch.manual_seed in" in error


def test_json_holds_the_answer_and_allow_accepts_it(capsys):
    assert main([*ROUTER, "format=json", "allow=['score / ']"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["found"] == 0
    assert [site["limit"] for site in answer["sites"] if site["allowed"] and site["witness"]] == [
        "division by zero"
    ]
    assert main([*ROUTER, "format=json", "kwargs={eps:1e-20}"]) == 0
    answer = json.loads(capsys.readouterr().out)
    (site,) = [
        s
        for s in answer["sites"]
        if s["limit"] == "division by zero" and s["phase"] == "forward" and s["operation"] == "div"
    ]
    assert site["verdict"] == {"float32": "proved safe"}
    assert "is added to a value that cannot be negative" in site["reason"]["float32"]


def test_a_batch_of_a_file_is_what_the_model_is_called_with(folder, capsys):
    torch.save((torch.randn(3, 4), torch.tensor([[1.0], [2.0], [3.0]])), folder / "batch.pt")
    assert main(["target=audited_models:Ratio", "dtype=float32", "batch=batch.pt"]) == 1
    out = capsys.readouterr().out
    assert "(self.layer(x) / y).mean()" in out
    assert "how: inputs[0][1] of zeros" in out or "how: inputs[1] of zeros" in out


def test_a_checkpoint_of_a_run_is_audited_with_its_own_batch(tiny, capsys):
    assert train([*tiny, "ffn=moe_writeup", "tracking=local"]) == 0
    capsys.readouterr()
    run = next(iter(__import__("pathlib").Path("runs").rglob("record.json"))).parent
    assert main([f"checkpoint={run}", "dtype=float32", "seconds=20"]) == 1
    out = capsys.readouterr().out
    assert "weights_SK = picked_scores_SK / (sums_S1 + self.norm_eps)" in out
    assert "in step" not in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["target=audited_models:Nope"], "has no attribute 'Nope'"),
        (["target=audited_models:Ratio"], "the model has no nn.Embedding; type batch=FILE"),
        (["target=audited_models:Router", "dtype=fp8"], "dtype=fp8: must be one of float32"),
        (["target=audited_models:Router", "witness=audited_models.py"], "is damaged, or no file"),
    ],
)
def test_a_mistake_is_answered_in_one_line(line, says, capsys):
    assert main(line) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
