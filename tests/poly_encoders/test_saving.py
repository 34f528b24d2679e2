"""Saving: a failure changes nothing, files that are not ours stay, and nothing of the process is changed."""

import errno
import os
import stat
from pathlib import Path

import pytest

from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.saving import is_our_code, replace_file, staged_folder

CLASSES = [PolyEncoder, BiEncoder, CrossEncoder]


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def save_in_stage(folder, files):
    with staged_folder(folder) as staging:
        for name, content in files.items():
            file = Path(staging, name)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_are_put_in_place(tmp_path):
    folder = tmp_path / "models" / "model"
    save_in_stage(folder, {"model-00001-of-00002.safetensors": "1", "model.safetensors.index.json": "{}", "a/b": b"\0"})
    (folder / "notes.txt").write_text("mine")
    save_in_stage(folder, {"model.safetensors": "2", "a/b": "\0\0", "a/c": "c"})
    assert contents(folder) == {"model.safetensors": b"2", "a/b": b"\0\0", "a/c": b"c", "notes.txt": b"mine"}
    save_in_stage(folder, {"README.md": "no weights, so those that are there stay"})
    assert (folder / "model.safetensors").is_file()
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("is_new", [True, False])
def test_staging_leaves_nothing_behind(tmp_path, is_new):
    folder = tmp_path / "model"
    if not is_new:
        save_in_stage(folder, {"model.safetensors": "old"})
    before = contents(tmp_path)

    def interrupted():
        with staged_folder(folder) as staging:
            Path(staging, "model.safetensors").write_bytes(b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ([] if is_new else ["model"])
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        save_in_stage(tmp_path / "file", {})


@pytest.mark.parametrize("after", range(1, 8))
def test_a_failure_while_files_move_puts_the_old_ones_back(tmp_path, monkeypatch, after):
    old = {"model-1.txt": "1", "config.json": "2", "sub/part": "3", "model-00001-of-00001.safetensors": "4"}
    save_in_stage(tmp_path, old)
    before, moves, original = contents(tmp_path), [], Path.replace

    def sometimes(self, target):
        moves.append(target)
        if len(moves) == after:
            raise OSError("Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", sometimes)
    with pytest.raises(OSError, match="Input/output"):
        save_in_stage(tmp_path, dict.fromkeys(("config.json", "new.json", "sub/part", "model.safetensors"), "new"))
    monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_failed_save_leaves_the_old_checkpoint(model_class, checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = model_class(checkpoints(), device="cpu")
    model.save_pretrained(str(folder))
    before = contents(folder)

    def full_disk(_, path, **__):
        Path(path).write_bytes(b"half of a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        model_class(checkpoints(), device="cpu", max_turns=2).save_pretrained(str(folder))
    assert contents(folder) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_replacing_a_file(tmp_path, monkeypatch):
    file = tmp_path / "new" / "state.json"
    replace_file(file, "é")
    assert file.read_bytes() == "é".encode()

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        replace_file(file, b"other")
    assert contents(tmp_path) == {"new/state.json": "é".encode()}


# --- files that are not ours ------------------------------------------------------------------------------------------

THEIRS = {
    "handler.py": b"# Copyright 2026 Somebody\nclass EndpointHandler: ...\n",
    "ranking.py": b"\xe9 = 'no UTF-8'\n",
    "text_poly_encoder.py": b"",
}


def code_in(folder):
    return {name: content for name, content in contents(folder).items() if name.endswith(".py")}


@pytest.mark.parametrize("whole", [True, False])
def test_code_of_the_users_own_stays_and_ours_is_renewed(poly_encoder, saved_poly_encoder, tmp_path, whole):
    """A handler.py of the user's was taken for an old one of ours, and overwritten."""
    ours = code_in(saved_poly_encoder)
    assert all(is_our_code(code.decode()) for code in ours.values())
    for name, code in {**THEIRS, "modeling_poly_encoder.py": ours["modeling_poly_encoder.py"] + b"# old"}.items():
        (tmp_path / name).write_bytes(code)
    save = poly_encoder.save_pretrained if whole else poly_encoder[0].model.save_pretrained
    for _ in range(2):
        save(str(tmp_path))
        assert code_in(tmp_path) == {**ours, **THEIRS}
    for name in THEIRS:
        (tmp_path / name).unlink()
    save(str(tmp_path))
    assert code_in(tmp_path) == ours


@pytest.mark.parametrize(
    ("model_class", "options"),
    [(BiEncoder, {}), (BiEncoder, {"reduction": "first_m_mean", "num_codes": 2}), (CrossEncoder, {})],
)
def test_the_other_kinds_bring_no_code_but_a_pooling(model_class, options, checkpoints, tmp_path):
    for name, code in THEIRS.items():
        (tmp_path / name).write_bytes(code)
    model_class(checkpoints(), device="cpu", **options).save_pretrained(str(tmp_path))
    found = code_in(tmp_path)
    assert not options or is_our_code(found.pop("first_m_pooling.py").decode())
    assert found == THEIRS


# --- the process ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_a_new_folder_gets_the_mode_that_the_process_gives(tmp_path, monkeypatch, mask, mode):
    """To read the umask it was set to zero for a moment, in which other threads' files were open to everybody."""
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", lambda _: pytest.fail("the umask of the whole process was touched"))
            save_in_stage(tmp_path / "model", {"sub/file": "x"})
    finally:
        os.umask(before)
    for folder in (tmp_path / "model", tmp_path / "model" / "sub"):
        assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "model" / "sub" / "file").stat().st_mode) == mode & 0o666
