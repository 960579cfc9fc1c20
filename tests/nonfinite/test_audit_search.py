"""What an audit's search reaches, how it says so, and that a witness is one."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nonfinite
from nonfinite.auditing.audit_report import AS_IS, INPUT, SAFE, SHOWN, UNKNOWN, WEIGHTS, WITNESS
from nonfinite.auditing.reach import Reach
from nonfinite.auditing.saved_witness import read_witness, run_witness

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


class Router(nn.Module):
    def __init__(self, eps=None):
        super().__init__()
        self.eps = eps
        self.gate = nn.Linear(32, 6, bias=False)
        nn.init.normal_(self.gate.weight, std=0.02, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        score = self.gate(x).float().sigmoid()
        picked = score.topk(2, dim=-1)[0]
        total = picked.sum(-1, keepdim=True)
        if self.eps is not None:
            total = total + self.eps
        return picked / total


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 3)

    def forward(self, x):
        return self.layer(x / x.norm(dim=-1, keepdim=True))


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 3)

    def forward(self, x):
        y = self.layer(x)
        return y / (y - y)


class Labels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 3)

    def forward(self, x, labels):
        return F.cross_entropy(self.layer(x), labels)


def audited(model, inputs=X, **more):
    return nonfinite.audit(model, inputs, folder=None, **more)


def test_a_router_without_an_epsilon_is_reached_by_moving_its_weights():
    found = audited(Router()).found[0]
    assert found.limit == "division by zero"
    assert found.source.code == "return picked / total"
    assert set(found.witnesses) == {"float32", "bfloat16", "float16"}
    witness = found.witnesses["float32"]
    assert witness.changes == WEIGHTS
    assert "gate.weight moved (largest entry 0." in witness.how
    assert 2 < witness.doublings < 12


def test_a_router_with_an_epsilon_is_proved_safe():
    found = audited(Router(eps=1e-20))
    assert found.found == []
    (site,) = [s for s in found.sites if s.limit == "division by zero" and s.phase == "forward"]
    assert site.verdict("float32") == SAFE
    assert site.reasons["float32"] == "1e-20 is added to a value that cannot be negative"


def test_an_input_that_fails_is_preferred_to_weights():
    witness = audited(Norm()).found[0].witnesses["float32"]
    assert (witness.changes, witness.doublings) == (INPUT, 0.0)
    assert witness.how.startswith("inputs")


def test_a_model_that_fails_as_it_is_says_so():
    assert audited(Broken()).found[0].witnesses["float32"].changes == AS_IS


def test_labels_are_all_ignored_once():
    inputs = {"x": X, "labels": torch.tensor([0, 1, 2, 0])}
    (site,) = audited(Labels(), inputs).found
    assert site.limit == "no valid label"


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 3)

    def forward(self, x, scale):
        return self.layer(x) / scale


def test_an_input_of_a_single_number_is_changed():
    witness = audited(Scaled(), (X, torch.tensor(2.0))).found[0].witnesses["float32"]
    assert witness.how == "inputs[1] of zeros"


def test_a_mask_with_one_hidden_entry_is_tried():
    class Entropy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, x, hidden):
            logs = self.layer(x).masked_fill(hidden, -torch.inf).log_softmax(-1)
            return (logs.exp() * logs).sum()

    found = audited(Entropy(), (X, torch.zeros(4, 3, dtype=torch.bool))).found
    assert any("whose first column is 1" in w.how for s in found for w in s.witnesses.values())


def test_inputs_and_weights_are_moved_together():
    class Exponential(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.layer(x).exp()

    witness = audited(Exponential(), 0.5 * X[:, :4]).found[0].witnesses["float32"]
    assert witness.how.startswith("inputs enlarged, layer.weight moved")


def test_an_overflow_in_float16_needs_weights_that_are_near():
    class Large(nn.Module):
        def __init__(self, size):
            super().__init__()
            self.layer = nn.Linear(32, 3, bias=False)
            nn.init.constant_(self.layer.weight, size)

        def forward(self, x):
            return self.layer(x.abs() + 1) * 400

    assert audited(Large(0.01), dtypes=[torch.float16]).found == []
    (site,) = audited(Large(1.9), dtypes=[torch.float16]).found
    assert site.limit == "float16 overflow"


class Doubled(nn.Module):
    """Its product overflows before its exponential does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 3, bias=False)
        nn.init.constant_(self.layer.weight, 0.02)

    def forward(self, x):
        e = self.layer(x).exp()
        return e * e


def test_an_operation_is_reached_though_a_later_one_fails_first():
    found = audited(Doubled(), dtypes=[torch.float32]).found
    assert [site.source.code for site in found if site.limit == "exp overflow"] == [
        "e = self.layer(x).exp()"
    ]


def test_weights_of_zeros_do_not_hide_an_overflow():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 3)
            nn.init.constant_(self.layer.weight, 0.5)
            nn.init.zeros_(self.layer.bias)

        def forward(self, ids):
            return self.layer(1 + ids.to(self.layer.weight.dtype)) * 400

    ids = torch.arange(32).repeat(4, 1) % 2
    (site,) = nonfinite.audit(Shifted(), ids, dtypes=[torch.float16], folder=None).found
    assert site.limit == "float16 overflow"
    assert "layer.weight moved" in site.best.how
    assert "bias" not in site.best.how
    assert 0 < site.best.doublings <= 3


def test_inputs_and_weights_share_the_range_of_an_overflow():
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 6)

        def forward(self, x, y):
            return (self.layer(x) - self.layer(y)).square().sum(-1)

    inputs = (X[:, :8], X[:, 8:16])
    torch.manual_seed(0)
    assert audited(Distance(), inputs, dtypes=[torch.float16]).found == []


def test_scores_are_driven_below_a_mask_that_hides_them_all():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 12)

        def forward(self, x, hidden):
            q, k = self.layer(x).chunk(2, dim=-1)
            scores = q @ k.T + hidden * torch.finfo(x.dtype).min
            return scores.softmax(-1) @ k

    mask = torch.ones(4, 4).triu(1)
    (site,) = audited(Scores(), (X, mask)).found
    assert "+ hidden * torch.finfo(x.dtype).min" in site.source.code
    assert set(site.witnesses) == {"float16"}
    assert site.best.how.startswith("inputs[1] of ones, layer")


def test_a_batch_of_one_row_is_tried_and_no_proof_rests_on_more():
    class Standard(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, x, advantage):
            return self.layer(x).mean(-1) * (advantage / (advantage.std() + 1e-3))

    found = audited(Standard(), (X, X[:, 0]), dtypes=[torch.float32])
    (site,) = found.found
    assert site.limit == "std of one element"
    assert site.best.how == "the first row of the inputs alone"
    assert not site.was_contradicted


def test_a_dtype_in_which_the_model_cannot_be_run_is_told():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, x):
            return self.layer(x).masked_fill(x[:, :3] > 9, -1e9)

    found = audited(Hidden())
    assert found.dtypes == ["float32", "bfloat16"]
    assert "not looked at in float16, in which the model cannot be run: value cannot" in str(found)
    assert list(found.as_dict()["refused"]) == ["float16"]


def test_an_overflow_that_needs_weights_of_zeros_is_far():
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 3)

        def forward(self, x):
            out = self.layer(x)
            norm = out.norm(dim=-1, keepdim=True)
            return (out.float() / (norm.float() + 1e-12)).to(x.dtype)

    assert audited(Unit(), dtypes=[torch.float16]).found == []


def test_the_gradient_of_a_root_of_a_softplus_is_reached_though_the_sum_has_an_epsilon():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(32, 6, bias=False)

        def forward(self, x):
            score = F.softplus(self.gate(x).float()).sqrt()
            picked = score.topk(2, dim=-1)[0]
            return picked / (picked.sum(-1, keepdim=True) + 1e-20)

    site = audited(Gate(), dtypes=[torch.float32]).found[0]
    assert (site.phase, site.limit) == ("backward", "infinite slope at the edge of the domain")
    assert site.source.code == "score = F.softplus(self.gate(x).float()).sqrt()"


def test_a_smaller_range_reaches_less():
    narrow = audited(Router(), reach=Reach(weights=0.1))
    assert not any("float32" in site.witnesses for site in narrow.found)
    sites = [s for s in narrow.sites if s.limit == "division by zero" and s.phase == "forward"]
    assert sites[0].verdict("float32") in (SAFE, UNKNOWN)


def test_the_model_and_the_random_state_stay_as_they_were():
    model = Router().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    audited(model)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_search_ends_by_its_time():
    found = audited(Router(), seconds=0)
    assert found.ran_out_of_time
    assert found.found == []
    assert "ended by its time limit" in str(found)


class Slow(Router):
    """A model each of whose passes takes nine seconds, by a clock of its own."""

    clock = 0.0

    def forward(self, x):
        Slow.clock += 9.0
        return super().forward(x)


def test_no_pass_is_begun_that_would_end_after_the_time(monkeypatch):
    monkeypatch.setattr("time.monotonic", lambda: Slow.clock)
    begun = Slow.clock
    found = audited(Slow(), dtypes=[torch.float32], seconds=60)
    assert found.ran_out_of_time
    assert Slow.clock - begun <= 60


def test_a_witness_is_saved_and_fails_again(tmp_path):
    found = nonfinite.audit(Router(), X, folder=tmp_path)
    file = found.found[0].witnesses["float32"].file
    again = run_witness(Router(), read_witness(file))
    assert again.finding.mechanism == "division by zero"
    assert again.is_same
    again = run_witness(Router(eps=1e-20), read_witness(file))
    assert (again.finding, again.is_same, again.other_weights) == (None, False, [])


class TwoLayers(Router):
    """A witness changes the gate, and leaves the layer after it alone."""

    def __init__(self, seed=0):
        super().__init__()
        self.last = nn.Linear(2, 2, bias=False)
        nn.init.normal_(self.last.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return self.last(super().forward(x))


def test_weights_that_a_witness_leaves_alone_are_known_again(tmp_path):
    found = nonfinite.audit(TwoLayers(), X, folder=tmp_path, dtypes=[torch.float32])
    files = [w.file for site in found.found for w in site.witnesses.values()]
    saved = [read_witness(file) for file in files]
    of_gate = next(each for each in saved if set(each["weights"]) == {"gate.weight"})
    again = run_witness(TwoLayers(), of_gate)
    assert again.is_same
    assert again.other_weights == []
    assert run_witness(TwoLayers(seed=1), of_gate).other_weights == ["last.weight"]


def test_a_model_that_fails_as_it_is_is_said_to():
    class Broken(Router):
        def forward(self, x):
            return (super().forward(x) - 2).sqrt()

    found = audited(Broken())
    assert found.fails_as_given
    assert "fails as it is" in str(found)
    assert audited(Router()).fails_as_given == []


class Angle(nn.Module):
    """The cosine of a vector with itself is above 1 in bfloat16, and 1 in float32."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.acos((self.scale * x * x).sum(-1))


def test_a_precision_in_which_the_model_fails_as_it_is_is_named():
    x = torch.full((1, 3), 0.5771)
    found = audited(Angle(), x, dtypes=[torch.float32, torch.bfloat16], seconds=10)
    assert found.fails_as_given == ["bfloat16"]
    assert "in bfloat16 the model fails as it is, so no other weights were tried" in str(found)


def test_what_is_left_out_of_the_first_screen_is_counted():
    found = audited(Router())
    found.sites += [
        dataclasses.replace(site, witnesses={}, reasons={"float32": None}, operation=f"{number}")
        for number in range(SHOWN + 3)
        for site in found.sites[:1]
    ]
    for number, site in enumerate(found.sites[-SHOWN - 3 :]):
        site.source = dataclasses.replace(site.source, line=number)
    lines = str(found).splitlines()
    told = lines[lines.index("neither proved nor reached, nearest first:") + 1 :]
    assert [line.startswith("  division by zero") for line in told[:SHOWN]] == [True] * SHOWN
    assert told[SHOWN].startswith("  ... and 3 more; format=json")


def test_the_counts_of_the_first_screen_add_up():
    found = audited(Router())
    (line,) = [line for line in str(found).splitlines() if line.startswith("reached: ")]
    reached, safe, unknown = (
        int(part.split()[0]) for part in re.findall(r": (\d+.*?)(?:;|$)", line)
    )
    assert reached + safe + unknown == len(found.sites)


def test_a_single_weight_of_zeros_is_told_alone():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(8, 32)
            self.a, self.b = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)

        def forward(self, ids):
            x = self.table(ids)
            b = self.b(x)
            return self.a(x) / self.a(x).norm(dim=-1, keepdim=True) + b / (1 + b.norm())

    found = nonfinite.audit(Norms(), torch.tensor([1, 2]), folder=None)
    hows = [w.how for site in found.found for w in site.witnesses.values()]
    assert any(how in ("table.weight of zeros", "a.weight of zeros") for how in hows)


@pytest.mark.parametrize("dtype", ["float32", torch.int64])
def test_a_dtype_that_is_none_is_told(dtype):
    with pytest.raises(ValueError, match="must be a floating-point dtype, such as"):
        audited(Router(), dtypes=[dtype])


def test_a_file_that_is_no_witness_is_refused(tmp_path):
    file = tmp_path / "a.pt"
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        read_witness(file)
    torch.save({"x": 1}, file)
    with pytest.raises(ValueError, match="no witness"):
        read_witness(file)


def test_the_table_fits_a_screen_and_begins_with_the_line():
    lines = str(audited(Router())).splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) < 120
    assert "NaN or Inf reached at 1 place" in lines[0]
    assert "picked / total" in lines[3]
    assert "usual fix: add an epsilon" in "\n".join(lines)


def test_what_is_allowed_is_not_found():
    found = audited(Router(), allow=["picked / total"])
    assert found.found == []
    assert "accepted by allow: " in str(found)
    sites = found.as_dict()["sites"]
    assert next(site["allowed"] for site in sites if site["witness"])
    assert sites[0]["verdict"]["float32"] == WITNESS
    json.dumps(found.as_dict())


def test_a_model_that_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="cannot be run on these inputs"):
        audited(Router(), torch.randn(4, 3))


def test_the_library_does_not_load_the_audit_until_it_is_asked_for():
    program = (
        "import sys, nonfinite; print(any('auditing' in n for n in sys.modules)); nonfinite.audit;"
        "print('lightning' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
