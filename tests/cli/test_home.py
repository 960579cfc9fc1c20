"""A leading ~ is the user's home in every field that names a place, and in no other."""

from pathlib import Path

import pytest
import yaml

from src.common.errors import InputError
from src.common.override_grammar import FREE_TEXT, PATHS, quote_free_text
from src.config.compose import compose
from src.config.hydra_compose import CONF
from src.tracking.client import Server
from src.train import main
from tests.runs import ROOT

COMMANDS = sorted(
    file.stem for file in CONF.glob("*.yaml") if (ROOT / "src" / f"{file.stem}.py").is_file()
)
TEXTS = {
    *("study", "prompt", "target", "kwargs", "weights", "to", "attention", "ffn", "studies"),
    *("device", "precision", "dtype", "format", "contestants", "poison.kind"),
    *("data.url", "data.dtype", "data.sha256", "tracking.sweep_id", "tracking.parent_run_id"),
    *("model.target", "model.residual_init", "compile", "observe"),
    *("recipe.decay_params", "recipe.matmul_precision", "recipe.precision", "recipe.schedule"),
    *("mlflow", "arm", "endpoint", "control", "family", "only"),
    *("guard.on_nonfinite", "guard.on_alarm", "trainer.accelerator", "trainer.strategy"),
}
"""Fields that may hold text and name no place."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def text_fields() -> set[str]:
    """Fields of every command whose value in conf/ is text, null or missing."""
    found: set[str] = set()

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if name not in ("hydra", "defaults"):
                    walk(f"{prefix}.{name}" if prefix else name, inner)
        elif isinstance(value, str) and "${" in value:
            pass
        elif (isinstance(value, str) and not _is_number(value)) or value is None:
            found.add(prefix)

    for name in (*COMMANDS, "base"):
        walk("", yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    for group in ("data", "tokenizer", "tracking", "trainer"):
        for file in (CONF / group).glob("*.yaml"):
            content = yaml.safe_load(file.read_text()) or {}
            walk("", content if group in content else {group: content})
    return found


def _is_number(text: str) -> bool:
    # PyYAML reads 3e-3 as text.
    try:
        float(text)
    except ValueError:
        return False
    return True


NUMBERS = {
    *("seed", "tokens_per_second", "timeout", "batch_size", "top_k", "top_p", "port"),
    *("q_latent_dim", "kv_latent_dim", "rope_dim", "rope_stride", "num_rope_keys", "num_routed"),
    *("num_shared", "inner_dim", "data.max_chars", "tokenizer.vocab_size", "watch.float_max"),
    *("guard.max_consecutive", "model.vocab_size", "model.head_dim", "poison.every"),
}
"""Fields that are null in conf/ or missing there, and hold numbers."""


def test_every_field_that_may_hold_text_is_known_as_a_place_or_as_none():
    fields = text_fields()
    assert {"run", "out", "paths.runs", "data.path", "init", "tracking.uri"} <= fields
    assert fields - set(PATHS) - TEXTS - NUMBERS == set()


@pytest.mark.parametrize("field", PATHS)
@pytest.mark.parametrize("place", ["~/a b/c", "~"])
def test_it_is_written_in_full(field, place, home):
    full = place.replace("~", str(home))
    assert quote_free_text(f"{field}={place}") == f"{field}='{full}'"


def test_it_is_written_in_full_among_several(home):
    assert quote_free_text("init=~/a,b,~/c") == f"init='{home}/a','b','{home}/c'"
    assert quote_free_text("data.path=[~/a,'~/b',c~]") == f"data.path=[{home}/a,'{home}/b',c~]"
    assert quote_free_text('paths.runs="~/a"') == f'paths.runs="{home}/a"'


@pytest.mark.parametrize("place", ["a~", "a/~/b", "./~", "a,~x/y"])
def test_elsewhere_it_is_a_letter(place, home):
    assert quote_free_text(f"paths.runs={place}") == f"paths.runs='{place}'"


@pytest.mark.parametrize("field", sorted(set(FREE_TEXT) - set(PATHS)))
def test_a_field_that_is_no_place_keeps_it(field, home):
    assert quote_free_text(f"{field}=~/x") == f"{field}='~/x'"


def test_the_home_of_no_user_is_refused(home, capsys):
    with pytest.raises(InputError, match="no user has this home"):
        quote_free_text("paths.runs=~nobody-of-this-name/x")
    assert main(["paths.runs=~nobody-of-this-name/x"]) == 2
    assert capsys.readouterr().err.startswith("error: paths.runs=~nobody-of-this-name/x: ")


def test_a_run_goes_there_and_reads_from_there(tiny, home):
    home.mkdir()
    (home / "text.txt").write_text("To be, or not to be, that is the question.\n" * 50)
    places = ["paths.runs=~/runs", "data=text", "data.path=~/text.txt", "data.max_chars=null"]
    assert main([*tiny, *places]) == 0
    (folder,) = (home / "runs").glob("*/*/seed-0")
    assert yaml.safe_load((folder / "config.yaml").read_text())["paths"]["runs"] == f"{home}/runs"
    assert not Path("~").exists()


def test_a_database_of_the_environment_may_lie_there(home, monkeypatch):
    home.mkdir()
    assert Server("sqlite:///~/x.db").uri == f"sqlite:///{home}/x.db"
    typed = quote_free_text("tracking.uri=sqlite:///~/x.db")
    assert compose("train", [typed]).tracking.uri == f"sqlite:///{home}/x.db"
