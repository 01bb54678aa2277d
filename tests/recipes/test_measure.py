"""``kdjax measure`` from words to files, through real processes, with few calls."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from rich.console import Console

from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.measure import results as contract
from kdjax.measure import rounds
from kdjax.model import logits_of
from kdjax.recipes import measure
from kdjax.tasks import language
from tests import deployed
from tests.helpers import digits, tiny_language_config

SILENT = lambda text: None
WITH_TORCH = importlib.util.find_spec("torch") is not None


@functools.cache
def expected():
    """What SciPy says of the convolution, which is the reference, and of the linear model."""
    test = digits().test
    said = [logits(test.inputs).argmax(-1) for logits in (deployed.convolution_logits, deployed.linear_logits)]
    return [(float((one == test.labels).mean()), float((one == said[0]).mean())) for one in said]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    teacher = deployed.write_artefact(folder / "t", "stablehlo", "jax", "model.bin", deployed.jax_bytes())
    student = deployed.write_artefact(
        folder / "s", "onnx", "onnxruntime", "model.onnx", deployed.onnx_bytes(), arm="student_distilled"
    )
    words = [str(teacher), str(student)]
    if WITH_TORCH:
        import torch

        torch.jit.trace(deployed.torch_module(), torch.zeros(2, 1, 8, 8)).save(str(folder / "net.pt"))
        words.append(f"torch={folder}/net.pt:nchw,scaled")
    return measure.run(words, workdir=folder / "out", calls=30, say=SILENT), folder


def test_accuracy_and_agreement_are_those_of_the_files(measured):
    found = measured[0]["models"]
    assert list(found)[:2] == ["teacher stablehlo", "student_distilled onnx"]
    quality = [(one["test"]["accuracy"], one["test"]["agreement"]) for one in found.values()]
    np.testing.assert_allclose(quality[:2], expected(), atol=1e-9)
    assert expected()[0][0] > 0.9 and 0.5 < expected()[1][1] < 1.0


def test_the_files_hold_what_was_returned(measured):
    found, folder = measured
    assert contract.load(folder / "out" / "measure.json") == json.loads(json.dumps(found))
    assert "The machine was" in (folder / "out" / "measure.html").read_text()
    console = Console(width=160, record=True)
    console.print(measure.table(found))
    text = console.export_text()
    assert "latency p50, batch 1" in text and "student_distilled onnx" in text and "of it" in text


def test_every_model_was_timed_at_every_batch(measured):
    found = measured[0]
    assert found["settings"]["calls"] == 30 and found["settings"]["rounds"] == 3
    for entry in found["models"].values():
        times = [entry["latency_ms"][key] for key in contract.PERCENTILES]
        assert 0 < times[0] <= times[1] <= times[2] and len(entry["latency_ms"]["rounds"]) == 3
        for key in ("items_per_s", "cpu_s_per_1000", "peak_bytes"):
            assert set(entry[key]) == {"1", "8", "32"} and all(value > 0 for value in entry[key].values())


@pytest.mark.skipif(not WITH_TORCH, reason="torch is not installed")
def test_a_model_of_pytorch_with_the_same_weights_answers_the_same(measured):
    found = measured[0]["models"]["torch"]
    assert (found["test"]["accuracy"], found["test"]["agreement"]) == pytest.approx(expected()[0])
    assert found["weights_bytes"] == 4 * 1362 and found["inputs"] == ["nchw", "scaled"]


def test_a_language_model_is_measured_by_windows(tmp_path, monkeypatch):
    config = configs.resolve(tiny_language_config())
    dataset = language.load(config)
    model = language.make_model(config, config.student, dataset, language.classes(config, dataset))
    variables = jax.device_get(model.init(jax.random.key(0)))
    batch, length = export.symbolic_shape("batch, length")
    apply = jax.jit(lambda tokens: logits_of(model.apply(variables, {"tokens": tokens}, train=False)[0]))
    content = bytes(export.export(apply)(jax.ShapeDtypeStruct((batch, length), jnp.int32)).serialize())
    about = {
        "task": "language", "context": 32, "labels": None, "data": {"task": "language", **config.data.to_dict()},
        "input": {"name": "tokens", "shape": ["batch", "length"], "dtype": "int32"},
    }  # fmt: skip
    folder = deployed.write_artefact(tmp_path / "lm", "stablehlo", "jax", "model.bin", content, **about)
    monkeypatch.setattr(rounds, "SCORE_S", 0.0)  # so that as few windows as a batch holds are scored
    found = measure.run([str(folder)], workdir=tmp_path / "out", calls=10, say=SILENT)
    (entry,) = found["models"].values()
    assert found["data"]["examples"] == 32 < found["data"]["of"]
    assert entry["ratios"] is None and entry["test"]["agreement"] == 1.0
    assert 3.0 < entry["test"]["bits_per_byte"] < 12.0  # an untrained model over 257 ids: about 8
    assert entry["tokens_per_s"]["32"] == pytest.approx(32 * entry["items_per_s"]["32"])
    assert "32 of the" in (tmp_path / "out" / "measure.html").read_text()


def test_errors_come_in_one_sentence(tmp_path):
    (tmp_path / "net.onnx").write_bytes(deployed.onnx_bytes())
    net = str(tmp_path / "net.onnx")
    run = lambda *words, **more: measure.run(words, workdir=tmp_path / "out", calls=10, say=SILENT, **more)
    with pytest.raises(UserError, match="no data to measure on are known: name them with --config"):
        run(net)
    with pytest.raises(UserError, match="0 timed calls"):
        measure.run([net], workdir=tmp_path, calls=0)
    config = configs.default()
    config.data.update(name="synthetic", options={"shape": (16, 16, 3), "classes": 10})
    with pytest.raises(UserError, match=r"net\.onnx: it takes \[8, 8, 1\] .* has \[16, 16, 3\]"):
        run(net, config=config)
    assert not (tmp_path / "out" / "measure.json").exists()


def test_a_foreign_file_alone_is_measured_on_the_data_of_a_config(tmp_path):
    (tmp_path / "net.onnx").write_bytes(deployed.onnx_bytes())
    found = measure.run(
        [str(tmp_path / "net.onnx")], workdir=tmp_path / "out", config=configs.default(), calls=10, say=SILENT
    )
    assert found["models"]["net"]["test"]["accuracy"] == pytest.approx(expected()[1][0])
    assert found["models"]["net"]["weights_bytes"] == 4 * 650
