"""From a finished workdir to artefacts that answer as JAX does, and what is refused on the way."""

import importlib.util
import json
import shutil

import numpy as np
import pytest

from kdjax import experiment as experiments
from kdjax import huggingface, results
from kdjax.data import tokenizers
from kdjax.errors import UserError
from kdjax.export import artefact, safetensors
from kdjax.measure import runtimes
from kdjax.recipes import distill, export
from tests.helpers import digits, equal_trees, tiny_config, tiny_language_config


def silent(_):
    pass


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A finished run whose distilled student ends in its teacher's classifier (SimKD)."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    config = tiny_config()
    config.student.reuse_classifier = True
    distill.run(config, folder, say=silent)
    return folder


@pytest.fixture(scope="module")
def made(workdir):
    """The student alone, which is a plain multilayer perceptron, in every format that needs no extra of its own."""
    names = ("onnx", "onnx-int8", "stablehlo", "safetensors")
    found = export.run(workdir, formats=names, arm="student_alone", data_licence="CC BY 4.0", say=silent)
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A decoder that was trained and not scored."""
    folder = tmp_path_factory.mktemp("text") / "run"
    distill.run_one(tiny_language_config(), folder, "student_alone", say=silent)
    return folder


def by_hand(variables, images):
    """The multilayer perceptron of ``tiny_config`` in float64."""
    dense = lambda x, layer: x @ layer["kernel"].astype(np.float64) + layer["bias"]
    data, params = digits(), variables["params"]
    x = (images.astype(np.float64) / 255 - data.mean) / data.std
    return dense(np.maximum(dense(x.reshape(len(x), -1), params["blocks"]["0"]), 0), params["head"])


def test_each_file_answers_as_the_formula_on_the_whole_test_set(workdir, made):
    test = digits().test
    wanted = by_hand(safetensors.load(made["safetensors"].model), test.inputs)
    scored = results.load(workdir / "results.json")["arms"]["student_alone"]
    assert scored["test"]["accuracy"] == np.mean(wanted.argmax(-1) == test.labels)
    for name in ("onnx", "stablehlo", "onnx-int8"):
        one = artefact.read(made[name].folder)
        found = runtimes.open_model(one.model, one.manifest["runtime"]).call(test.inputs)
        parity = one.manifest["parity"]
        apart = np.abs(found - wanted).max()
        assert parity["examples"] == len(test.labels)
        assert parity["accuracy"] == np.mean(found.argmax(-1) == test.labels)
        assert parity["agreement"] == np.mean(found.argmax(-1) == wanted.argmax(-1))
        assert parity["max_abs_difference"] == pytest.approx(apart, abs=2e-6)
        assert apart < (1e-4 if name != "onnx-int8" else 0.1 * np.ptp(wanted))
    assert made["onnx-int8"].manifest["weights_bytes"] < 0.5 * made["onnx"].manifest["weights_bytes"]


def test_the_manifest_says_what_the_file_takes(made):
    about = made["onnx"].manifest
    assert about["input"] == {"name": "images", "shape": ["batch", 8, 8, 1], "dtype": "uint8"}
    assert about["output"] == {"name": "logits", "shape": ["batch", 10], "dtype": "float32"}
    assert about["labels"] == [str(label) for label in range(10)]
    assert about["preprocessing"]["mean"] == pytest.approx(digits().mean)
    assert about["params"] == 64 * 8 + 8 + 8 * 10 + 10
    assert about["data"]["name"] == "digits" and about["data"]["task"] == "classification"
    assert about["file_bytes"] == made["onnx"].model.stat().st_size
    assert made["safetensors"].manifest["parity"] is None


def test_the_card_has_losses_by_class_and_warns_of_what_is_missing(workdir, made):
    told = json.loads((made["onnx"].folder / "card.json").read_text())
    test, wanted = digits().test, by_hand(safetensors.load(made["safetensors"].model), digits().test.inputs)
    for row in told["classes"]:
        own = test.labels == int(row["label"])
        assert row["examples"] == own.sum()
        assert row["accuracy"] == pytest.approx(np.mean(wanted.argmax(-1)[own] == int(row["label"])))
    teacher = sum(row["teacher"] * row["examples"] for row in told["classes"]) / len(test.labels)
    assert teacher == pytest.approx(results.load(workdir / "results.json")["arms"]["teacher"]["test"]["accuracy"])
    losses = [row["accuracy"] - row["teacher"] for row in told["classes"]]
    assert losses == sorted(losses)
    assert told["warnings"] == []  # the data has a note, and nobody taught this arm
    assert set(told["results"]["arms"]) == {"teacher", "student_alone", "student_distilled"}
    assert "CC BY 4.0" in (made["onnx"].folder / "card.md").read_text()


def test_a_student_with_its_teachers_classifier(workdir, tmp_path):
    out = tmp_path / "new" / "place"
    program, weights = export.run(workdir, formats=["stablehlo", "safetensors"], out=out, say=silent)
    scored = results.load(workdir / "results.json")["arms"]["student_distilled"]
    assert program.folder == out / "stablehlo"
    assert program.manifest["parity"]["accuracy"] == pytest.approx(scored["test"]["accuracy"])
    assert program.manifest["params_sha256"] == scored["params_sha256"]
    variables = safetensors.load(weights.model)
    experiment = experiments.load(distill.saved_config(workdir))
    logits = experiment.distilled.apply(variables, np.zeros((1, 8, 8, 1), np.float32), train=False)[0].logits
    assert logits.shape == (1, 10)
    assert len(json.loads((program.folder / "card.json").read_text())["warnings"]) == 2  # teacher and data


def test_a_teacher(workdir, tmp_path):
    (one,) = export.run(workdir, formats=["stablehlo"], arm="teacher", out=tmp_path, say=silent)
    scored = results.load(workdir / "results.json")["arms"]["teacher"]
    assert one.manifest["parity"]["accuracy"] == pytest.approx(scored["test"]["accuracy"])


def test_a_decoder_with_its_tokenizer(text, tmp_path):
    names = ["onnx", "stablehlo", "safetensors"]
    found = dict(
        zip(names, export.run(text, formats=names, arm="student_alone", out=tmp_path, say=silent), strict=True)
    )
    for name in ("onnx", "stablehlo"):
        about = artefact.read(found[name].folder).manifest
        assert about["parity"]["max_abs_difference"] < 1e-4 and about["parity"]["agreement"] > 0.99
        assert about["input"] == {"name": "tokens", "shape": ["batch", "length"], "dtype": "int32"}
        assert about["output"]["shape"] == ["batch", "length", 257] and about["context"] == 32
        assert tokenizers.load(found[name].folder).size == 257
        run = runtimes.open_model(found[name].model, about["runtime"]).call
        tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
        # Causal, and free in batch and length: a shorter sequence gets the same logits.
        np.testing.assert_allclose(run(tokens[:1, :7]), run(tokens)[:1, :7], atol=1e-5)
    folder = found["safetensors"].folder
    variables = huggingface.load(folder, huggingface.read_config(folder))
    assert equal_trees(variables, export.load_arm(text, "student_alone").variables)
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: transformers\n")
    assert "run kdjax evaluate" in (folder / "card.md").read_text()


# -------------------------------------------------------------------------------------------------------- refused


def refused(match, workdir, **changes):
    with pytest.raises(UserError, match=match):
        export.run(workdir, **{"formats": ["stablehlo"], "say": silent, **changes})


def test_unknown_names(workdir):
    refused(r"unknown format 'onxn': did you mean 'onnx'\?", workdir, formats=["onxn"])
    refused("say which formats", workdir, formats=[])
    refused(r"unknown arm 'student': did you mean 'student_\w+'\?", workdir, arm="student")


def test_an_artefact_that_is_there(workdir, made):
    refused("onnx is there already: name another folder", workdir, formats=["onnx"], arm="student_alone")


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="tensorflow is installed")
def test_a_package_that_is_not_installed(workdir, tmp_path):
    refused(
        r"the format litert needs tensorflow: run pip install 'kdjax\[litert\]'",
        workdir,
        formats=["stablehlo", "litert"],
        out=tmp_path,
    )
    assert not list(tmp_path.iterdir())


def test_no_workdir_and_an_unfinished_one(workdir, tmp_path):
    refused("is not a workdir of kdjax", tmp_path)
    unfinished = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(unfinished / "checkpoints" / "student_distilled" / "45")
    refused(r"student_distilled in .* is at step 40 of 45: run kdjax distill", unfinished)
    shutil.rmtree(unfinished / "checkpoints" / "student_distilled")
    refused("student_distilled in .* has no checkpoint", unfinished)
    assert not (unfinished / "export" / "student_distilled").exists()


def test_a_file_that_does_not_answer_as_jax_does_is_not_kept(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "BOUND", 0.0)
    refused("stablehlo differs from JAX by .*e-0.* on the test set", workdir, out=tmp_path)
    assert not list(tmp_path.iterdir())
