"""An artefact: a folder with a model, its card, and a manifest that says what they are and what they hash to.

``manifest.json`` has the keys of ``KEYS`` and, under ``files``, the SHA-256 of every other file. It tells damage and
edits from what was exported; it is no signature.
"""

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import kdjax
from kdjax.errors import UserError
from kdjax.untrusted import inside, parse_json
from kdjax.writers import write_atomic

MANIFEST, CARD, CARD_JSON = "manifest.json", "card.md", "card.json"
SCHEMA = 1
KEYS = (
    "format",
    "runtime",  # that runs it: onnxruntime, jax or litert; None: weights alone
    "model",  # the file that a runtime opens
    "task",
    "arm",
    "input",  # {"name", "shape", "dtype"}: a length that is free has a name
    "output",
    "context",  # longest sequence of a language model
    "labels",
    "preprocessing",  # what is done inside the model before its first layer
    "params",
    "weights_bytes",  # as the file stores them
    "file_bytes",  # of the model's files
    "config_sha256",
    "params_sha256",
    "data",  # the config's, so that the test split can be loaded again
    "parity",  # against JAX on the test split
)


class Artefact(NamedTuple):
    """An exported model."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def model(self) -> Path:
        """The file that a runtime opens."""
        return self.folder / self.manifest["model"]


def check_free(folder: str | Path) -> None:
    """Raises a UserError where there is something already: an artefact is never written over."""
    if Path(folder).exists():
        raise UserError(f"{folder} is there already: name another folder with --out, or delete it.")


def write(folder: str | Path, fill: Callable[[Path], Mapping[str, Any]]) -> Artefact:
    """Writes an artefact whole or not at all: into a hidden folder beside, which is then renamed.

    Args:
      folder: must not exist.
      fill: puts the files into the empty folder that it is given, and returns the manifest's ``KEYS``.

    Raises:
      UserError: the folder exists or cannot be written; or whatever ``fill`` raises, and then nothing is left.
    """
    folder = Path(folder)
    check_free(folder)
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        about = fill(partial)
        assert set(about) == set(KEYS), f"a manifest has {KEYS}"
        files = {
            path.relative_to(partial).as_posix(): sha256(path) for path in sorted(partial.rglob("*")) if path.is_file()
        }
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = {"schema": SCHEMA, "kdjax": kdjax.__version__, "created": created, **about, "files": files}
        write_atomic(partial / MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free some space, or name another --out."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Artefact(folder, manifest)


def read(folder: str | Path) -> Artefact:
    """Reads an artefact and compares every file with what was exported.

    Raises:
      UserError: no artefact, one of another schema, or a file that is missing, was changed, or lies outside.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} is no artefact of kdjax, for it has no {MANIFEST}: make one with kdjax export."
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): export the model again.") from error
    _check(path, manifest)
    for name, expected in manifest["files"].items():
        _check_file(folder, name, expected)
    return Artefact(folder, manifest)


def sha256(path: Path) -> str:
    """The digest of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict):
        raise UserError(f"{path} holds no JSON object: export the model again.")
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {manifest.get('schema')!r} and this kdjax reads {SCHEMA}: use the kdjax that wrote it, "
            "or export the model again."
        )
    for key in (*KEYS, "files"):
        if key not in manifest:
            raise UserError(f"{path} has no {key!r}: export the model again.")
    files, model = manifest["files"], manifest["model"]
    if not isinstance(files, dict) or not isinstance(model, str) or model not in files:
        raise UserError(f"{path} does not list its model {model!r} among its files: export it again.")


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = inside(folder, name)
    if not path.is_file():
        raise UserError(f"{path} is missing: copy the whole folder, or export the model again.")
    if sha256(path) != expected:
        raise UserError(f"{path} was changed after export (its SHA-256 differs): export the model again.")
