"""The names that conf/ tells without the schema are those of the configuration itself."""

import json
import os
import subprocess
import sys

import pytest

from src.config.compose import compose
from src.config.field_names import fields_of, names_in
from src.config.field_roles import OFF, role_of
from tests.runs import ROOT

LINES = [
    [],
    ["attention=gqa", "ffn=mlp", "tokenizer=bpe"],
    ["ffn=moe_writeup", "stability=[ema,noise]", "preset=crash"],
    ["data=text", "data.path=x.txt", "trainer=ddp"],
    ["data=tokens", "data.path=x.bin", "tokenizer.vocab_size=9"],
    ["preset=writeup", "trainer=cpu", "tracking=local"],
]
PROGRAM = """
import json, sys
from src.config.field_names import fields_of, names_in
lines = json.loads(sys.argv[1])
print(json.dumps([names_in("train", fields_of("train", line)) for line in lines]))
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def light() -> list[list[str]]:
    """The names for each line, in a process that never imports the schema."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(LINES)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("number", range(len(LINES)))
def test_they_are_the_same_with_and_without_the_schema(light, number):
    assert set(light[number]) == set(names_in("train", fields_of("train", LINES[number])))


@pytest.mark.parametrize("number", range(len(LINES)))
def test_every_field_of_a_run_is_among_them_and_no_other(light, number):
    fields: list[str] = []

    def walk(prefix: str, value: object) -> None:
        fields.append(prefix)
        for key, inner in value.items() if isinstance(value, dict) else ():
            walk(f"{prefix}.{key}", inner)

    for name, value in compose("train", LINES[number]).plain().items():
        walk(name, value)
    typed = [field for field in fields if role_of(field).typed]
    assert set(typed) <= set(light[number])
    for section in ("recipe", "guard", "model", "ffn"):
        # config.yaml leaves out the fields that early versions did not have, where they are off.
        within = [f for f in light[number] if f.startswith(f"{section}.") and f not in OFF]
        assert sorted(within) == sorted(f for f in typed if f.startswith(f"{section}."))
