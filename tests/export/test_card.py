"""The model card says what is known, warns of what is missing, and takes no markup from what a user wrote."""

import copy

import pytest

from kdjax.export import card

FACTS = {
    "artefact": {
        "format": "onnx-int8",
        "runtime": "onnxruntime",
        "model": "model.onnx",
        "task": "classification",
        "arm": "student_distilled",
        "input": {"name": "images", "shape": ["batch", 8, 8, 1], "dtype": "uint8"},
        "output": {"name": "logits", "shape": ["batch", 3], "dtype": "float32"},
        "context": None,
        "labels": ["cat", "dog", "owl"],
        "preprocessing": {"inside": True, "scale": 1 / 255, "mean": [0.5], "std": [0.25]},
        "params": 1234,
        "weights_bytes": 2048,
        "file_bytes": 4096,
        "config_sha256": "c" * 64,
        "params_sha256": "d" * 64,
        "parity": {"examples": 300, "max_abs_difference": 0.0123, "agreement": 0.99, "accuracy": 0.9},
    },
    "model": {"name": "cnn", "options": {"widths": (8, 16)}},
    "teachers": [{"name": "teacher", "model": "resnet8", "init": "runs/big", "licence": "MIT"}],
    "data": {"name": "digits", "train": 1438, "test": 300, "licence": "CC BY 4.0"},
    "results": {
        "arms": {
            "teacher": {"params": 10000, "test": {"accuracy": 0.95, "nll": 0.2}},
            "student_alone": {"params": 1234, "test": {"accuracy": 0.85, "nll": 0.4}},
            "student_distilled": {"params": 1234, "test": {"accuracy": 0.9, "nll": 0.3}},
        },
        "headline": "It is better.",
        "caveat": "One seed.",
    },
    "compression": [],
    "classes": [
        {"label": "cat", "examples": 100, "accuracy": 0.9, "teacher": 0.92},
        {"label": "dog", "examples": 0, "accuracy": None, "teacher": None},
        {"label": "owl", "examples": 200, "accuracy": 0.91, "teacher": 0.99},
    ],
    "traces": [],
    "versions": {"kdjax": "0.1.0"},
}


def made(**changes):
    found = card.make({**copy.deepcopy(FACTS), **changes})
    return found, card.markdown(found)


def test_all_that_a_reader_needs_is_there():
    found, text = made()
    assert found["warnings"] == [] and "Warning" not in text
    for said in ("# student distilled (cnn), onnx-int8", "1,234", "2.0 KiB", "uint8", "resnet8", "MIT", "CC BY 4.0"):
        assert said in text
    assert "| accuracy | 0.95 | 0.85 | 0.9 |" in text  # teacher, control arm, this one
    assert "It is better. One seed." in text
    assert "c" * 64 in text and "kdjax 0.1.0" in text and "0.012" in text


def test_a_compressed_model_says_how_it_was_made_and_what_its_control_reached():
    score = lambda accuracy: {"accuracy": accuracy}
    steps = [
        {"name": "1_cut", "method": "prune", "of": "student_distilled", "params": 700}
        | {"made": score(0.5), "alone": score(0.7), "distilled": score(0.8)},
        {"name": "2_small", "method": "quantise", "of": "1_cut", "params": 700}
        | {"made": score(0.79), "alone": None, "distilled": None},
    ]
    found, text = made(results=None, compression=steps)
    assert found["warnings"] == []
    assert "| 1\\_cut | prune | student distilled | 700 | 50.00 | 70.00 | 80.00 |" in text
    assert "| 2\\_small | quantise | 1\\_cut | 700 | 79.00 | – | – |" in text


def test_the_largest_loss_comes_first_and_an_untested_class_last():
    found, text = made()
    assert [row["label"] for row in found["classes"]] == ["owl", "cat", "dog"]
    assert text.index("| owl | 200 | 91.00 | 99.00 |") < text.index("| cat |") < text.index("| dog | 0 | – | – |")


@pytest.mark.parametrize("part", ["teachers", "data"])
def test_a_missing_licence_is_a_warning_at_the_top(part):
    facts = copy.deepcopy(FACTS)
    (facts["teachers"][0] if part == "teachers" else facts["data"])["licence"] = " "
    found, text = made(**{part: facts[part]})
    assert len(found["warnings"]) == 1 and part.removesuffix("s") in found["warnings"][0]
    assert text.index("**Warning:** no licence note") < text.index("## Model")
    assert "**not given**" in text


def test_a_run_without_scores_and_a_control_arm_without_teacher():
    found, text = made(results=None, teachers=[])
    assert "run kdjax evaluate" in found["warnings"][0]
    assert "learned from labels alone" in text


def test_a_language_model_is_told_by_its_bits():
    scores = {"bits_per_byte": 2.5, "perplexity": 6.0, "nll": 1.7}
    arms = {
        "teacher": {"params": 9, "test": scores},
        "student_distilled": {"params": 3, "test": {**scores, "perplexity": 7}},
    }
    about = FACTS["artefact"] | {"task": "language", "labels": None, "preprocessing": None, "context": 256}
    results = {**FACTS["results"], "arms": arms}
    _, text = made(artefact=about, classes=None, results=results, traces=["chat/*.jsonl"])
    assert "2.5000 bits per byte (teacher: 2.5000), perplexity 7 (teacher: 6)" in text
    assert "256 tokens" in text and r"Learned from chat/\*.jsonl" in text


def test_what_a_user_wrote_is_no_markup():
    licence = "x\n\n# Heading <b>|</b> [a](javascript:b) `c`"
    _, text = made(data=FACTS["data"] | {"licence": licence, "name": "a|b"})
    assert r"x \# Heading \<b\>\|\</b\> \[a\]\(javascript:b\) \`c\`" in text
    assert "\n# Heading" not in text and r"a\|b" in text
