"""Documents of tokens packed into windows of one length, and which of their tokens are targets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdjax.errors import UserError, unknown

PACKINGS = ("split", "whole")
LONGER = ("refuse", "cut")
_HIGHEST = np.iinfo(np.uint16).max


class Document(NamedTuple):
    """The tokens of one document, with the ones that begin and end it."""

    name: str  # where it is from, for messages
    ids: NDArray[np.int32]  # [n]
    in_loss: NDArray[np.bool_]  # [n], whether the token is wanted as a target
    bytes: NDArray[np.int32]  # [n], UTF-8 bytes of the text that the token covers


class TextSplit(NamedTuple):
    """Windows of ``context + 1`` tokens; the id of a window is its index here.

    The token at position i + 1 is the target of position i where both are of one document and the token is wanted:
    ``target_mask``. Nothing depends on which token it is, so that the one that ends a text may also fill padding.
    """

    tokens: NDArray[Any]  # [n, context + 1], uint16, or int32 where ids need it, 0 in padding
    segments: NDArray[np.uint16]  # [n, context + 1], documents of a window numbered from 1, 0: padding
    in_loss: NDArray[np.bool_]  # [n, context + 1]
    bytes: NDArray[np.uint16]  # [n, context + 1], UTF-8 bytes of the text that the token covers


def pack(
    documents: Sequence[Document], context: int, packing: str, *, size: int, longer: str = "refuse"
) -> tuple[TextSplit, int]:
    """Documents in windows of ``context + 1`` tokens, in an order that depends on the documents alone.

    ``split`` lays the documents one after the other and cuts where a window is full. A window begins with the last
    token of the one before, so that every token of a document but its first is a target exactly once. The last window
    is filled up with padding.

    ``whole`` never cuts a document: the longest first, each into the first window that has room. A document longer
    than a window is refused or, with ``longer="cut"``, taken as several, each of which begins with the last token of
    the one before.

    A window without any target, such as one in the midst of a long prompt, is left out.

    Args:
      documents: at least one, each with at least one target.
      context: targets that a window has room for.
      packing: ``split`` or ``whole``.
      size: of the vocabulary: ids are below it.
      longer: of ``whole``: ``refuse`` or ``cut``.

    Returns:
      The windows, and how many were left out.

    Raises:
      UserError: an unknown packing, a context that is too small or too large, no documents, a document without any
        target or, where they are refused, longer than a window, or fewer tokens than one window of ``split`` holds.
    """
    if packing not in PACKINGS:
        raise unknown("packing", packing, PACKINGS)
    if longer not in LONGER:
        raise unknown("way with longer documents", longer, LONGER)
    if not isinstance(context, int) or not 2 <= context < _HIGHEST:
        raise UserError(f"a context of {context} tokens: give at least 2, and fewer than {_HIGHEST}.")
    if not documents:
        raise UserError("there are no documents to pack: give at least one.")
    for number, document in enumerate(documents):
        if not document.in_loss[1:].any():
            raise UserError(
                f"document {number} ({document.name}) has no token that is a target: leave it out, or give it text "
                "that is in the loss."
            )
        if len(document.ids) and document.bytes.max() > _HIGHEST:
            raise UserError(
                f"document {number} ({document.name}) has a token of {document.bytes.max()} bytes: at most {_HIGHEST} "
                "can be counted."
            )
    lengths = np.array([len(document.ids) for document in documents])
    if packing == "split":
        places, segments = _split(lengths, context)
    else:
        if longer == "refuse" and lengths.max() > context + 1:
            number = int(lengths.argmax())
            raise UserError(
                f"document {number} ({documents[number].name}) has {lengths[number]} tokens and a window "
                f"{context + 1}: make data.context larger, or set data.options.longer to cut."
            )
        places, segments = _whole(lengths, context)
    filled = segments > 0

    def laid_out(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.where(filled, np.concatenate(values)[places], 0)

    split = TextSplit(
        laid_out([document.ids for document in documents]).astype(np.int32 if size > _HIGHEST else np.uint16),
        segments.astype(np.uint16),
        laid_out([document.in_loss for document in documents]).astype(bool),
        laid_out([document.bytes for document in documents]).astype(np.uint16),
    )
    useful = target_mask(split).any(axis=1)
    kept = TextSplit(split.tokens[useful], split.segments[useful], split.in_loss[useful], split.bytes[useful])
    return kept, int((~useful).sum())


def target_mask(split: TextSplit) -> NDArray[np.bool_]:
    """Whether the token after each position is its target, bool [n, context]."""
    before, after = split.segments[:, :-1], split.segments[:, 1:]
    return (before == after) & (after > 0) & split.in_loss[:, 1:]


def _split(lengths: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in the documents' concatenation, and segments, of windows [n, context + 1] that run on over documents."""
    total = int(lengths.sum())
    if total < context + 1:
        raise UserError(
            f"the text has {total} tokens, too few for one window of {context + 1}: give more text, or make "
            "data.context smaller."
        )
    windows = -(-(total - 1) // context)
    places = np.arange(windows)[:, None] * context + np.arange(context + 1)
    filled = places < total
    places = np.minimum(places, total - 1)
    document = np.repeat(np.arange(len(lengths)), lengths)[places]
    return places, np.where(filled, document - document[:, :1] + 1, 0)


def _whole(lengths: NDArray[np.int64], context: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The same for windows of whole documents; longer ones in pieces that overlap by one token."""
    pieces = -(-(lengths - 1) // context)
    document = np.repeat(np.arange(len(lengths)), pieces)
    part = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = (np.cumsum(lengths) - lengths)[document] + part * context
    lengths = np.minimum(lengths[document] - part * context, context + 1)

    order, windows = _first_fit_decreasing(lengths, context + 1)
    order = order[np.argsort(windows[order], kind="stable")]
    lengths, windows, starts = lengths[order], windows[order], starts[order]
    begins = np.cumsum(lengths) - lengths  # of each piece, were all windows full
    first = np.searchsorted(windows, windows)  # the first piece in the window of each
    shape = (int(windows[-1]) + 1, context + 1)
    each = np.arange(lengths.sum())
    into = each + np.repeat(windows * shape[1] - begins[first], lengths)
    places, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    places.flat[into] = each + np.repeat(starts - begins, lengths)
    segments.flat[into] = np.repeat(np.arange(len(order)) - first + 1, lengths)
    return places, segments


def _first_fit_decreasing(lengths: NDArray[np.int64], room: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order in which pieces are placed, the longest first, and the window of each piece; both [n].

    All pieces of one length are placed at once: first-fit puts as many as fit into the first window, then the next.
    """
    order = np.argsort(-lengths, kind="stable")
    windows = np.empty_like(lengths)
    free = np.zeros(0, np.int64)
    for members in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1):
        length = lengths[members[0]]
        unplaced = max(len(members) - int((free // length).sum()), 0)
        opened = -(-unplaced // (room // length))
        free = np.concatenate([free, np.full(opened, room)])
        windows[members] = np.searchsorted(np.cumsum(free // length), np.arange(len(members)), side="right")
        free -= np.bincount(windows[members], minlength=len(free)) * length
    return order, windows
