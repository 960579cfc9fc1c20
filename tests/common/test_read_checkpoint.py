"""A flipped bit in a file of tensors: every command that reads the file says so in one line."""

import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from src import convert, diagnose, generate, replay, train
from src.common.errors import InputError
from src.common.read_checkpoint import read_tensors
from tests import runs
from tests.conftest import TINY
from tests.nonfinite.test_recorder import FAILING

EXPONENT_BIT = 0x40
"""In the last byte of a little-endian float32: a small weight becomes a huge one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_cache):
    """A run with an incident, a state for branches, and all its checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        cache = f"paths.cache={shared_cache}"
        return runs.train([*TINY, cache], *FAILING, "save_at=[8]").resolve()


def data_of(file: Path, record: str) -> int:
    """Where the data of a record begin in an archive."""
    with zipfile.ZipFile(file) as archive:
        (info,) = [i for i in archive.infolist() if i.filename.endswith(record)]
    head = file.read_bytes()[info.header_offset :][:30]
    name, extra = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + 30 + name + extra


def flip(file: Path, place: int, bit: int = EXPONENT_BIT) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


def places(file: Path) -> dict[str, tuple[int, int]]:
    """Byte and bit of flips in everything that such a file is made of."""
    with zipfile.ZipFile(file) as archive:
        records = [i for i in archive.infolist() if "/data/" in i.filename and i.file_size >= 64]
        directory = archive.start_dir
    first, middle, last = records[0], records[len(records) // 2], records[-1]
    return {
        "the pickle": (data_of(file, "/data.pkl") + 400, 1),
        "the end of the pickle": (data_of(file, "/.format_version") - 200, 1),
        "the format's version": (data_of(file, "/version"), 1),
        "the byte order": (data_of(file, "/byteorder"), 2),
        "the header of a record": (first.header_offset + 1, 4),
        "the compression of a record": (directory + 10, 8),
        "the encryption of a record": (directory + 8, 1),
        "a checksum in the directory": (directory + 16, 1),
        "a name in the directory": (directory + 47, 1),
        "an exponent in the first tensor": (data_of(file, first.filename) + 7, EXPONENT_BIT),
        "an exponent in a middle tensor": (data_of(file, middle.filename) + 11, EXPONENT_BIT),
        "the lowest bit of the last tensor": (data_of(file, last.filename) + 4, 1),
    }


PLACES = [
    *("the pickle", "the end of the pickle", "the format's version", "the byte order"),
    *("the header of a record", "the compression of a record", "the encryption of a record"),
    *("a checksum in the directory", "a name in the directory"),
    *("an exponent in the first tensor", "an exponent in a middle tensor"),
    "the lowest bit of the last tensor",
]


@pytest.mark.parametrize("place", PLACES)
def test_a_flipped_bit_is_refused_wherever_it_is(place, folder, tmp_path):
    file = Path(shutil.copy(folder / "checkpoints" / "last.ckpt", tmp_path))
    read_tensors(file, field="resume")
    flip(file, *places(file)[place])
    with pytest.raises(InputError, match=rf"^resume={file}: is damaged"):
        read_tensors(file, field="resume")


READERS = {
    "resume": (train, ["{args}", "resume={last}"], "last"),
    "resume=auto": (train, ["{args}"], "last"),
    "fork": (train, ["{args}", "study=other", "fork={run}@8"], "state"),
    "init": (train, ["tracking=local", "preset=smoke", "study=other", "init={run}"], "last"),
    "tokenizer": (
        train,
        ["tracking=local", "study=other", "tokenizer=checkpoint", "tokenizer.path={run}"],
        "last",
    ),
    "generate": (generate, ["run={run}", "prompt=a"], "last"),
    "convert": (convert, ["source={run}", "out=converted", "attention=gqa"], "last"),
    "diagnose": (diagnose, ["checkpoint={run}"], "last"),
    "diagnose an incident": (diagnose, ["checkpoint={incident}"], "incident"),
    "a batch": (diagnose, ["checkpoint={run}", "batch={batch}"], "batch"),
    "replay": (replay, ["incident={incident}"], "incident"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_names_the_file_in_one_line(
    reader, folder, tmp_path, monkeypatch, capsys, shared_cache
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / folder.relative_to(folder.parents[3])
    shutil.copytree(folder, run)
    if reader == "resume=auto":
        (run / "record.json").unlink()
    (incident,) = (run / "incidents").iterdir()
    files = {
        "last": run / "checkpoints" / "last.ckpt",
        "state": run / "checkpoints" / "state-8.ckpt",
        "incident": incident / "state.pt",
        "batch": tmp_path / "batch.pt",
    }
    torch.save(torch.arange(2, 34).repeat(2, 2), files["batch"])
    command, texts, which = READERS[reader]
    known = {"run": run, "last": files["last"], "incident": incident, "batch": files["batch"]}
    arguments = [text.format(args="{args}", **known) for text in texts]
    if "{args}" in arguments:
        arguments[:1] = [*TINY, f"paths.cache={shared_cache}", *FAILING, "save_at=[8]"]
        if reader == "resume":
            arguments += ["study=other"]
    record = places(files[which]) if which != "batch" else {}
    place = record.get("an exponent in a middle tensor", (data_of(files[which], "/data/0"), 1))
    before = set(tmp_path.rglob("*"))
    flip(files[which], *place)
    capsys.readouterr()
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "is damaged" in said.err
    assert {files[which].name, run.name, incident.name} & set(said.err.replace(":", "/").split("/"))
    assert set(tmp_path.rglob("*")) == before
