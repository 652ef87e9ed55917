"""The folder that convert writes: what it replaces, what it refuses, what is left where a run was broken off."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from ramify.convert import convert
from ramify.convert.folder import NewFolder
from ramify.model.checkpoint import INDEX, SINGLE

CONFIG = json.dumps({"model_type": "llama"})


def made(folder, **files):
    """A folder with these files; "__" stands for a dot."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def listing(path):
    return {str(each.relative_to(path)) for each in path.rglob("*")}


def write(out, force=False):
    with NewFolder(out, force) as new:
        new.add("a", torch.ones(2))
        new.close()
        new.text("config.json", CONFIG)


WRITTEN = {"out", "out/config.json", f"out/{SINGLE}"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["folder", "empty", "file", "link"])
def test_out_that_appears_meanwhile(tmp_path, what, force):
    """Refused at the end as it would have been at the start; --force replaces what it may."""

    def appear(items, stage):
        yield from items
        out, other = tmp_path / "out", tmp_path / "other"
        {
            "folder": lambda: made(out, thesis="mine"),
            "empty": out.mkdir,
            "file": lambda: out.write_text("mine"),
            "link": lambda: out.symlink_to(made(other, thesis="mine")),
        }[what]()
        found.update(listing(tmp_path))

    found = set()
    says = "exists; takes a new folder" if not force else "so --force does not replace it"
    options = {"method": "rtn", "evaluate": False, "force": force, "progress": appear}
    if force and what == "empty":
        convert("zoo-drafter", tmp_path / "out", **options)
        assert (tmp_path / "out" / SINGLE).is_file() and [each.name for each in tmp_path.iterdir()] == ["out"]
        return
    with pytest.raises(ValueError, match="is a symbolic link" if what == "link" else says):
        convert("zoo-drafter", tmp_path / "out", **options)
    assert listing(tmp_path) == {name for name in found if ".part" not in name} and len(found) > len(listing(tmp_path))


def test_the_system_has_the_last_word(tmp_path, monkeypatch):
    """Something that comes between the last check and the renaming stays."""
    new = NewFolder(tmp_path / "out")
    monkeypatch.setattr("ramify.convert.folder.refuse", lambda out, force: None)
    with pytest.raises(ValueError, match="out cannot be written .*not empty"), new:
        made(tmp_path / "out", thesis="mine")
    assert listing(tmp_path) == {"out", "out/thesis"}


WHOLE = {"config__json": CONFIG, "model__safetensors": ""}


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"config__json": '{"port": 8080}', "index__html": ""}, "it has no config.json of a model"),
        ({"config__json": '{"port": 8080}', "model__safetensors": ""}, "it has no config.json of a model"),
        ({"config__json": "[1", "model__safetensors": ""}, "it has no config.json of a model"),
        ({"model__safetensors": ""}, "it has no config.json of a model"),
        ({"config__json": CONFIG, "tokenizer__json": ""}, "it has no safetensors"),
        ({**WHOLE, "thesis__tex": ""}, "it holds thesis.tex besides"),
        ({**WHOLE, "optimizer__pt": ""}, "it holds optimizer.pt besides"),
    ],
)
def test_force_replaces_checkpoints_only(tmp_path, files, says):
    made(tmp_path / "out", **files)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=f"no checkpoint folder, so --force does not replace it: {says}"):
        write(tmp_path / "out", force=True)
    assert listing(tmp_path) == before


def test_force_does_not_replace_folders_inside(tmp_path):
    made(made(tmp_path / "out", **WHOLE) / "tokenizer_of_mine", thesis="mine")
    with pytest.raises(ValueError, match="it holds tokenizer_of_mine besides"):
        write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "tokenizer_of_mine" / "thesis").is_file()


@pytest.mark.parametrize(
    "files",
    [
        {},
        WHOLE,
        {"config__json": '{"quantization_config": {}}', "model__safetensors__index__json": "", "README__md": "", "tokenizer__model": ""},
        {"config__json": '{"architectures": []}', "a-1__safetensors": "", "__gitattributes": "", "merges__txt": "", "LICENSE": ""},
    ],
)
def test_force_replaces(tmp_path, files):
    made(tmp_path / "out", **files)
    write(tmp_path / "out", force=True)
    assert listing(tmp_path) == WRITTEN and INDEX not in WRITTEN


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_refused(tmp_path, force, dangling):
    if not dangling:
        made(tmp_path / "real", **WHOLE)
    (tmp_path / "out").symlink_to(tmp_path / "real")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"OUT .*out is a symbolic link to .*real; takes a folder"):
        convert("zoo-drafter", tmp_path / "out", force=force, progress=lambda items, stage: pytest.fail("it had begun"))
    assert listing(tmp_path) == before and (tmp_path / "out").is_symlink()


def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead(tmp_path):
    """Gone after the next run; those of living processes, of other machines and of other folders stay."""
    here = platform.node()
    kept = {f".out.{os.getppid()}@{here}.1f.part", f".out.{dead()}@{here}-2.1f.part", f".other.{dead()}@{here}.1f.part", ".out.1.part"}
    gone = {f".out.{dead()}@{here}.1f.part", f".out.{dead()}@{here}.2e.old"}
    for name in kept | gone:
        made(tmp_path / name)
    aside = made(tmp_path / "aside" / f".out.{dead()}@{here}.2e.old", **WHOLE)
    made(tmp_path / "out", **WHOLE)
    write(tmp_path / "out", force=True)
    assert {each.name for each in tmp_path.iterdir()} == {"out", "aside", *kept}
    with pytest.raises(OSError, match="enough"), NewFolder(tmp_path / "aside" / "out"):
        raise OSError("enough")
    assert listing(tmp_path / "aside") >= {aside.name}  # while there is no OUT, it is the only copy


@pytest.mark.parametrize("name", ["n" * 250, "n" * 255, "\u00e9" * 127, "n" * 150])
def test_a_name_as_long_as_the_system_takes(tmp_path, name):
    """The name that it is written under is longer by what it is told apart by, so it holds the beginning alone; leftovers are found."""
    write(tmp_path / name)
    others = [f"{name[:-1]}x", name[:-1]]
    with pytest.raises(KeyboardInterrupt), NewFolder(tmp_path / others[0]) as new:
        left = new.path.name.replace(f".{os.getpid()}@", f".{dead()}@")
        raise KeyboardInterrupt
    made(tmp_path / left)
    made(tmp_path / left.replace(".part", ".old"), **WHOLE)
    write(tmp_path / others[1])
    assert (tmp_path / left).exists()  # another OUT's
    write(tmp_path / others[0])
    assert {each.name for each in tmp_path.iterdir()} == {name, *others, left.replace(".part", ".old")}
    write(tmp_path / others[0], force=True)
    assert {each.name for each in tmp_path.iterdir()} == {name, *others}


@pytest.mark.parametrize("force", [False, True])
def test_a_name_longer_than_the_system_takes(tmp_path, force):
    """Told before the work."""
    with pytest.raises(ValueError, match=r"^convert: OUT .*cannot be written \(File name too long\)"):
        convert("zoo-drafter", tmp_path / ("n" * 256), force=force, progress=lambda items, stage: pytest.fail("it had begun"))
    assert not list(tmp_path.iterdir())


def test_parents_are_made_and_removed(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with pytest.raises(KeyboardInterrupt), NewFolder(out):
        assert out.parent.is_dir()
        raise KeyboardInterrupt
    assert listing(tmp_path) == set()
    with pytest.raises(KeyboardInterrupt), NewFolder(out):
        (tmp_path / "a" / "thesis").write_text("mine")
        raise KeyboardInterrupt
    assert listing(tmp_path) == {"a", "a/thesis"}
    write(out)
    assert listing(out.parent) == WRITTEN
