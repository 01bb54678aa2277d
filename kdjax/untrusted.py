"""What comes from outside: names of files stay in their folder, text stays text. ``docs/security.md`` says why."""

import json
import re
from pathlib import Path
from typing import Any

from rich.text import Text

from kdjax.errors import UserError, visible


def inside(folder: str | Path, name: object) -> Path:
    """The path of the file of a folder that a file from elsewhere, such as a manifest, calls ``name``.

    A link may point to another file of the folder and, in the cache of Hugging Face's hub, to the blobs that its
    ``snapshots/REVISION`` consist of. Whether the file exists is not asked.

    Raises:
      UserError: no name, or one that leads out of the folder, by itself or by a link.
    """
    folder = Path(folder)
    if not isinstance(name, str) or not name or "\0" in name:
        raise UserError(f"{folder} should have a file called {name!r}, which is no name of a file: copy it anew.")
    place = folder / name
    roots = [folder.resolve()]
    if folder.absolute().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    try:
        found = place.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, or a name too long for the system
        raise UserError(f"{name!r} in {folder} leads nowhere: copy the folder anew.") from error
    if not any(found.is_relative_to(root) for root in roots):
        raise UserError(f"{name!r} in {folder} lies outside of it: put the file itself there, if you trust it.")
    return place


def parse_json(text: str | bytes) -> Any:
    """What a JSON document holds; a ValueError where it is none, also where it is nested too deeply to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def terminal(text: str, style: str = "") -> Text:
    """Plain text for a table of rich, in which ``[red]`` is no colour and nothing commands the terminal."""
    return Text(visible(text), style=style)


def markdown(value: object) -> str:
    """Plain text in Markdown: one line, in which nothing is markup or HTML."""
    line = visible(" ".join(str(value).split()))
    return re.sub(r"([\\`*_{}\[\]()#|<>~!&$])", r"\\\1", line)
