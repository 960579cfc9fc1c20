"""The texts that a run leaves at its end, and where they are shown."""

from contextlib import contextmanager, nullcontext
from urllib.parse import unquote

from src.data.tokenizer import ByteTokenizer, CharTokenizer
from src.generation.prompts import WRITEUP
from src.generation.samples import first_sample, samples_markdown
from src.study.report.make_report import write_report
from tests.builders import transformer
from tests.runs import train
from tests.study import synthetic
from tests.study.pages import Page
from tests.study.synthetic import Arm


def small_model(vocab_size=256):
    return transformer(vocab_size=vocab_size, max_seq_len=32)


def test_every_prompt_is_continued_with_every_kind_of_weights():
    model = small_model()

    @contextmanager
    def zeroed():
        before = model.head.weight.detach().clone()
        model.head.weight.data.zero_()
        yield
        model.head.weight.data.copy_(before)

    weights = {"raw": nullcontext, "ema": zeroed}
    text = samples_markdown(model, ByteTokenizer(), weights=weights, seed=0)
    for name in ("raw", "ema"):
        assert f"## {name} weights" in text
    for prompt in WRITEUP:
        assert text.count(f"### {prompt}\n") == 2
    assert first_sample(text).startswith(WRITEUP[0])
    assert text == samples_markdown(model, ByteTokenizer(), weights=weights, seed=0)
    raw, averaged = text.split("## ema weights")
    assert raw.split("\n\n", 1)[1] != averaged.split("\n\n", 1)[1]


def test_a_prompt_that_the_vocabulary_lacks_is_said_and_the_others_are_continued():
    letters = "".join(sorted(set("".join(WRITEUP)) - {"?"}))
    tokenizer = CharTokenizer(letters)
    model = small_model(vocab_size=len(letters))
    whole = {"raw": nullcontext}
    text = samples_markdown(model, tokenizer, weights=whole, seed=0)
    assert "(character '?': not among" in text
    assert "The throne room was" in text.split("~" * 12)[-2]


def test_a_vocabulary_that_lacks_every_prompt_is_said_for_each():
    text = samples_markdown(
        small_model(3), CharTokenizer("abc"), weights={"raw": nullcontext}, seed=0
    )
    assert text.count(": not among the 3 characters") == len(WRITEUP)


def test_a_run_leaves_samples_and_averages_that_it_only_carries_are_none_of_its_own(tiny):
    observed = train([*tiny, "study=a", "observe={ema:{decay:0.9,horizon_frac:null}}"])
    owned = train([*tiny, "study=b", "stability=ema"])
    assert "## ema weights" not in (observed / "samples.md").read_text()
    assert "## ema weights" in (owned / "samples.md").read_text()


def test_the_report_shows_one_text_an_arm_and_the_way_to_all(tmp_path):
    study = synthetic.study(tmp_path, {"none": Arm(), "warmdown": Arm(acts_from=240)}, seeds=2)
    for run in study.runs:
        text = f"# Samples\n\n{'~' * 12}\nOnce <b>\n\nupon {run.seed}\n{'~' * 12}\n"
        (run.folder / "samples.md").write_text(text)
    files = write_report(study, tmp_path / "out", show=False)
    page = Page(files.page)
    rows = page.table("Text samples")
    assert [row[0] for row in rows] == ["none", "warmdown"]
    assert all(row[2] == "Once <b> / upon 0" for row in rows)
    links = [
        attrs["href"]
        for tag, attrs in page.tags
        if tag == "a" and "samples.md" in (attrs.get("href") or "")
    ]
    assert all((tmp_path / "out" / unquote(link)).resolve().is_file() for link in links)
    assert len(links) == 2
    assert "Once &lt;b&gt; / upon 0" in (tmp_path / "out" / "report.md").read_text()
