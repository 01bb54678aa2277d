"""The runtimes and the worker's protocol, on files that were written without kdjax."""

import io
import json
import os
import sys

import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.measure import processes, runtimes, worker
from tests import deployed
from tests.helpers import digits


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    (folder / "linear.onnx").write_bytes(deployed.onnx_bytes())
    (folder / "conv.bin").write_bytes(deployed.jax_bytes())
    return folder


def test_onnxruntime_and_jax_answer_what_scipy_computes(files):
    images = digits().test.inputs
    onnx = runtimes.open_model(files / "linear.onnx", "onnxruntime")
    assert (onnx.input_shape, onnx.input_dtype) == (("batch", 8, 8, 1), "uint8")
    np.testing.assert_allclose(onnx.call(images), deployed.linear_logits(images), atol=1e-4)
    jax = runtimes.open_model(files / "conv.bin", "jax")
    assert (jax.input_shape, jax.input_dtype) == (("batch", 8, 8, 1), "uint8")
    np.testing.assert_allclose(jax.call(images[:32]), deployed.convolution_logits(images[:32]), atol=1e-4)
    assert jax.call(images[:1]).dtype == np.float32


def test_torch_answers_the_same(tmp_path):
    module, path = deployed.torch_module(), tmp_path / "net.pt"
    import torch

    torch.jit.trace(module, torch.zeros(2, 1, 8, 8)).save(str(path))
    runner = runtimes.open_model(path, "torch")
    images = digits().test.inputs[:33]
    given = np.ascontiguousarray(np.moveaxis(images, -1, 1), np.float32) / np.float32(255)
    np.testing.assert_allclose(runner.call(given), deployed.convolution_logits(images), atol=1e-4)
    assert runner.weights_bytes == 4 * (72 + 1280 + 10)
    assert runner.input_shape is None  # TorchScript does not say


def test_a_pickled_module_is_refused_and_never_loaded(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(Trap(), tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"net\.pt cannot be opened by torch"):
        runtimes.open_model(tmp_path / "net.pt", "torch")
    assert not (tmp_path / "sprung").exists()


def test_a_file_for_a_batch_of_one_is_called_once_per_example(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    model = onnx.load_from_string(deployed.onnx_bytes())
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "one.onnx")
    runner = runtimes.open_model(tmp_path / "one.onnx", "onnxruntime")
    images = digits().test.inputs[:5]
    assert runner.input_shape[0] == 1
    np.testing.assert_allclose(runner.call(images), deployed.linear_logits(images), atol=1e-4)


def test_errors_of_opening(tmp_path, monkeypatch):
    (tmp_path / "torn.onnx").write_bytes(deployed.onnx_bytes()[:100])
    with pytest.raises(UserError, match=r"torn\.onnx cannot be opened by onnxruntime"):
        runtimes.open_model(tmp_path / "torn.onnx", "onnxruntime")
    with pytest.raises(UserError, match="there is no file"):
        runtimes.open_model(tmp_path / "none.onnx", "onnxruntime")
    with pytest.raises(UserError, match="did you mean 'onnxruntime'"):
        runtimes.open_model(tmp_path / "torn.onnx", "onnxruntim")
    absent = runtimes.RUNTIMES["litert"]._replace(module="no_such_package.interpreter")
    monkeypatch.setitem(runtimes.RUNTIMES, "litert", absent)
    with pytest.raises(UserError, match=r"needs ai-edge-litert: run pip install 'kdjax\[litert\]'"):
        runtimes.require("litert")


def test_litert_where_it_is_installed(tmp_path):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    (tmp_path / "torn.tflite").write_bytes(b"no flatbuffer")
    with pytest.raises(UserError, match="cannot be opened by litert"):
        runtimes.open_model(tmp_path / "torn.tflite", "litert")


def served(*requests):
    answers = io.StringIO()
    worker.serve([json.dumps(request) for request in requests], answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


@pytest.fixture
def arrays(tmp_path):
    for name, value in {"images": digits().test.inputs, "labels": digits().test.labels}.items():
        np.save(tmp_path / f"{name}.npy", value)
    return tmp_path


def test_a_process_of_its_own_opens_times_and_scores(files, arrays):
    images, rows = str(arrays / "images.npy"), np.arange(1, 359, 2)
    labels = digits().test.labels.copy()
    labels[1] = -1
    np.save(arrays / "labels.npy", labels)
    np.save(arrays / "rows.npy", rows)
    cores = processes.choose_cores(1)
    with processes.started(["linear"], cores, 1) as (one,):
        opened = processes.ask(one, "open", path=str(files / "linear.onnx"), runtime="onnxruntime", threads=1)
        assert opened["input_shape"] == ["batch", 8, 8, 1]
        if cores is not None:
            assert os.sched_getaffinity(one.process.pid) == set(cores)
        processes.ask(one, "load", timed=images, test=images, labels=str(arrays / "labels.npy"))
        warmed = processes.ask(one, "warm", batch=8)
        assert warmed["shape"] == [8, 10] and warmed["peak_bytes"] > 0
        timed = processes.ask(one, "time", batch=8, calls=50, first=355)  # runs on over the end of the split
        assert len(timed["ms"]) == 50 and min(timed["ms"]) > 0
        processes.ask(one, "score", rows=str(arrays / "rows.npy"), out=str(arrays / "out.npz"))
        with pytest.raises(UserError, match=r"linear: .*cannot be run by onnxruntime .*\[1, 4\]"):
            np.save(arrays / "other.npy", np.zeros((3, 4), np.uint8))
            processes.ask(one, "load", timed=str(arrays / "other.npy"))
            processes.ask(one, "warm", batch=1)
        with pytest.raises(UserError, match="did you mean 'score'"):
            processes.ask(one, "scores")
        loaded = one.log.read_text()
    assert one.process.returncode == 0 and not loaded
    logits = deployed.linear_logits(digits().test.inputs[rows])
    with np.load(arrays / "out.npz") as found:
        np.testing.assert_array_equal(found["first"], logits.argmax(-1))
        log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(rows)), labels[rows]]
        log_p[0] = 0.0  # the one that has no label
        np.testing.assert_allclose(found["log_p"], log_p, atol=1e-4)


def test_a_worker_imports_no_jax_for_another_runtime(files):
    code = (
        "import io, json, sys\nfrom kdjax.measure import worker\n"
        f"request = dict(do='open', path={str(files / 'linear.onnx')!r}, runtime='onnxruntime', threads=1)\n"
        "worker.serve([json.dumps(request)], io.StringIO())\n"
        "sys.exit(bool({'jax', 'scipy', 'torch', 'ml_collections', 'sklearn'} & set(sys.modules)))"
    )
    import subprocess

    assert subprocess.run([sys.executable, "-c", code], env=processes.environment(1)).returncode == 0


def test_a_worker_that_dies_is_one_sentence():
    with processes.started(["gone"], None, 1) as (one,):
        one.process.kill()
        with pytest.raises(UserError, match=r"gone: its process ended while it should open \(killed by signal 9"):
            processes.ask(one, "open", path="x", runtime="jax", threads=1)


def test_nan_logits_are_refused(arrays):
    with pytest.raises(UserError, match="NaN or infinite"):
        worker.score(
            lambda x: np.full((len(x), 10), np.nan, np.float32), digits().test.inputs, digits().test.labels,
            np.arange(4), arrays / "out.npz",
        )  # fmt: skip


def test_requests_before_a_model_is_open_are_refused():
    (answer,) = served({"do": "warm", "batch": 1})
    assert "unknown request 'warm'" in answer["error"]


def test_too_many_threads_are_refused():
    with pytest.raises(UserError, match="1000000 threads"):
        processes.choose_cores(1_000_000)
