import numpy as np
import pytest

from kdjax.data import packing
from kdjax.data.packing import Document
from kdjax.errors import UserError


def _documents(lengths, seed=0, wanted=1.0):
    rng = np.random.default_rng(seed)
    documents = []
    for number, length in enumerate(lengths):
        in_loss = rng.random(length) < wanted
        in_loss[-1] = True
        ids = np.arange(length, dtype=np.int32) + 1000 * number  # each token is one of a kind
        documents.append(Document(f"d{number}", ids, in_loss, rng.integers(0, 9, length, dtype=np.int32)))
    return documents


def _targets(split):
    """(token before, target, its bytes) of all windows, by a loop over every position."""
    found = []
    for tokens, segments, in_loss, covered in zip(*split, strict=True):
        for i in range(len(tokens) - 1):
            if segments[i] == segments[i + 1] != 0 and in_loss[i + 1]:
                found.append((int(tokens[i]), int(tokens[i + 1]), int(covered[i + 1])))
    return found


def _wanted(documents):
    return [
        (int(d.ids[i]), int(d.ids[i + 1]), int(d.bytes[i + 1]))
        for d in documents
        for i in range(len(d.ids) - 1)
        if d.in_loss[i + 1]
    ]


LENGTHS = [5, 12, 2, 33, 9, 9, 2, 17, 40, 3, 8]


@pytest.mark.parametrize("context", [2, 7, 8, 40, 100])
@pytest.mark.parametrize("wanted", [1.0, 0.2])
def test_split_makes_every_token_but_the_first_a_target_once(context, wanted):
    documents = _documents(LENGTHS, wanted=wanted)
    split, dropped = packing.pack(documents, context, "split", size=20000)
    assert split.tokens.shape == (len(split.tokens), context + 1) and split.tokens.dtype == np.uint16
    assert [values.dtype for values in split[1:]] == [np.uint16, bool, np.uint16]
    assert _targets(split) == _wanted(documents)
    assert packing.target_mask(split).sum() == len(_wanted(documents))
    assert packing.target_mask(split).any(axis=1).all()
    assert dropped == -(-(sum(LENGTHS) - 1) // context) - len(split.tokens)
    if dropped == 0:  # each window goes on with the last token of the one before
        np.testing.assert_array_equal(split.tokens[1:, 0], split.tokens[:-1, -1])


@pytest.mark.parametrize("context", [39, 60, 200])
def test_whole_keeps_each_document_in_one_window(context):
    documents = _documents(LENGTHS)
    split, dropped = packing.pack(documents, context, "whole", size=20000)
    assert dropped == 0
    assert sorted(_targets(split)) == sorted(_wanted(documents))
    found = []
    for tokens, segments in zip(split.tokens, split.segments, strict=True):
        count = segments.max()
        assert sorted(segments.tolist(), key=lambda segment: (segment == 0, segment)) == segments.tolist()
        for segment in range(1, count + 1):
            found.append(tokens[segments == segment].tolist())
        assert not tokens[segments == 0].any()
    assert sorted(found) == sorted(document.ids.tolist() for document in documents)


def test_whole_is_first_fit_decreasing():
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 31, 300)
    free, contents = [], []
    for number in sorted(range(300), key=lambda number: -lengths[number]):
        place = next((w for w, room in enumerate(free) if room >= lengths[number]), len(free))
        if place == len(free):
            free.append(31)
            contents.append([])
        free[place] -= lengths[number]
        contents[place].append(number)
    split, _ = packing.pack(_documents(lengths), 30, "whole", size=10**6)
    assert split.tokens.dtype == np.int32
    found = [list(dict.fromkeys((tokens[segments > 0] // 1000).tolist())) for tokens, segments in zip(*split[:2])]  # noqa: B905
    assert found == contents


def test_a_longer_document_is_refused_or_cut():
    documents = _documents(LENGTHS)
    with pytest.raises(UserError, match=r"document 8 \(d8\) has 40 tokens and a window 17"):
        packing.pack(documents, 16, "whole", size=20000)
    split, _ = packing.pack(documents, 16, "whole", size=20000, longer="cut")
    assert sorted(_targets(split)) == sorted(_wanted(documents))


def test_a_window_without_target_is_left_out():
    prompt = Document("long", np.arange(30, dtype=np.int32), np.arange(30) >= 28, np.ones(30, np.int32))
    split, dropped = packing.pack([prompt], 10, "split", size=100)
    assert (len(split.tokens), dropped) == (1, 2)
    assert [target for _, target, _ in _targets(split)] == [28, 29]


def test_padding_is_told_by_place_and_not_by_value():
    ends = np.array([7, 0, 0, 5, 0], np.int32)  # 0 ends the text, and is what padding is filled with
    split, _ = packing.pack([Document("d", ends, np.ones(5, bool), np.ones(5, np.int32))] * 2, 7, "whole", size=10)
    assert split.tokens.tolist() == [[7, 0, 0, 5, 0, 0, 0, 0]] * 2
    for in_loss in (split.in_loss, np.ones_like(split.in_loss)):
        assert packing.target_mask(split._replace(in_loss=in_loss)).tolist() == [[True] * 4 + [False] * 3] * 2


def test_packing_does_not_depend_on_anything_but_the_documents():
    first, again = (packing.pack(_documents(LENGTHS), 50, "whole", size=20000)[0] for _ in range(2))
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packing": "hole"}, "did you mean 'whole'"),
        ({"longer": "cute"}, "did you mean 'cut'"),
        ({"context": 1}, "a context of 1 tokens"),
        ({"context": 70000}, "a context of 70000 tokens"),
        ({"documents": []}, "no documents"),
        ({"context": 500}, "140 tokens, too few for one window of 501"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = {"documents": _documents(LENGTHS), "context": 8, "packing": "split", "longer": "refuse", **change}
    with pytest.raises(UserError, match=message):
        packing.pack(given["documents"], given["context"], given["packing"], size=20000, longer=given["longer"])


def test_a_document_without_target_is_refused():
    documents = _documents([5, 5])
    documents[1] = documents[1]._replace(in_loss=np.arange(5) == 0)  # its first token, which nothing precedes
    with pytest.raises(UserError, match=r"document 1 \(d1\) has no token that is a target"):
        packing.pack(documents, 4, "split", size=20000)
    documents[1] = documents[0]._replace(bytes=np.full(5, 70000, np.int32))
    with pytest.raises(UserError, match="a token of 70000 bytes"):
        packing.pack(documents, 4, "split", size=20000)
