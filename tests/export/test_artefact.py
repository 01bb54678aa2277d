"""An artefact is whole, unchanged, and within its folder, or it is refused."""

import json

import pytest

from kdjax.errors import UserError
from kdjax.export import artefact

ABOUT = dict.fromkeys(artefact.KEYS) | {"format": "onnx", "model": "model.onnx", "params": 3}


def fill(folder):
    (folder / "model.onnx").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.bin").write_bytes(b"more")
    return ABOUT


@pytest.fixture
def made(tmp_path):
    return artefact.write(tmp_path / "out" / "onnx", fill)


def test_what_is_written_is_read_back(made):
    found = artefact.read(made.folder)
    assert found == made
    assert set(found.manifest["files"]) == {"model.onnx", "sub/more.bin"}
    assert found.model.read_bytes() == b"weights"
    assert [path.name for path in made.folder.parent.iterdir()] == ["onnx"]


def test_a_path_that_exists_is_left_alone(made):
    before = (made.folder / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="is there already: name another folder"):
        artefact.write(made.folder, lambda folder: pytest.fail("it was filled"))
    assert (made.folder / "manifest.json").read_bytes() == before


def test_a_failure_leaves_nothing(tmp_path):
    def fails(folder):
        fill(folder)
        raise UserError("it differs.")

    with pytest.raises(UserError, match="it differs"):
        artefact.write(tmp_path / "onnx", fails)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*name another --out"):
        artefact.write(tmp_path / "file" / "onnx", fill)


@pytest.mark.parametrize("name", ["model.onnx", "sub/more.bin"])
def test_a_changed_file_is_named(made, name):
    path = made.folder / name
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{name} was changed after export"):
        artefact.read(made.folder)


def test_a_missing_file_is_named(made):
    (made.folder / "sub" / "more.bin").unlink()
    with pytest.raises(UserError, match=r"more.bin is missing"):
        artefact.read(made.folder)


def test_no_artefact(tmp_path):
    with pytest.raises(UserError, match=r"is no artefact of kdjax.*kdjax export"):
        artefact.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        artefact.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "has schema 2 and this kdjax reads 1"),
        ({"files": {}}, "does not list its model"),
        ({"model": None}, "does not list its model"),
    ],
)
def test_another_manifest(made, change, message):
    manifest = {**made.manifest, **change}
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        artefact.read(made.folder)


def test_a_key_that_is_missing(made):
    manifest = {key: value for key, value in made.manifest.items() if key != "labels"}
    (made.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no 'labels'"):
        artefact.read(made.folder)


def test_a_file_outside_is_never_opened(made, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    (made.folder / "link").symlink_to(secret)
    for name in ("../../secret", str(secret), "link"):
        files = {**made.manifest["files"], name: artefact.sha256(secret)}
        (made.folder / "manifest.json").write_text(json.dumps({**made.manifest, "files": files}))
        with pytest.raises(UserError, match="lies outside"):
            artefact.read(made.folder)
