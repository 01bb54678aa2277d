"""Model files that several tests measure: classifiers of real digits, written without kdjax's own export."""

import functools
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import correlate
from sklearn.linear_model import LogisticRegression

from kdjax.export import artefact
from tests.helpers import digits

HASH = "0" * 64
IMAGES, LOGITS = ["batch", 8, 8, 1], ["batch", 10]


@functools.cache
def linear():
    """Weights [64, 10] and bias [10] of logistic regression on pixels from 0 to 255."""
    train = digits().train
    fitted = LogisticRegression(max_iter=100, tol=1e-2).fit(train.inputs.reshape(-1, 64) / 255.0, train.labels)
    return (fitted.coef_.T / 255.0).astype(np.float32), fitted.intercept_.astype(np.float32)


@functools.cache
def convolution():
    """Filters [3, 3, 1, 8], and a head [128, 10] with its bias on their means over 2 x 2 pixels."""
    filters = np.random.default_rng(0).normal(size=(3, 3, 1, 8)).astype(np.float32)
    fitted = LogisticRegression(max_iter=100, tol=1e-2).fit(
        features(digits().train.inputs, filters), digits().train.labels
    )
    return filters, fitted.coef_.T.astype(np.float32), fitted.intercept_.astype(np.float32)


def features(images, filters):
    """Float64, by SciPy: convolution of pixels in [0, 1], ReLU, means over 2 x 2 pixels, flattened."""
    padded = np.pad(images[..., 0] / 255.0, ((0, 0), (1, 1), (1, 1)))
    maps = [correlate(padded, np.asarray(filters[None, :, :, 0, i], np.float64), "valid") for i in range(8)]
    pooled = np.maximum(np.stack(maps, -1), 0).reshape(-1, 4, 2, 4, 2, 8).mean((2, 4))
    return pooled.reshape(len(images), -1)


def linear_logits(images):
    weights, bias = linear()
    return images.reshape(-1, 64).astype(np.float64) @ weights + bias


def convolution_logits(images):
    filters, head, bias = convolution()
    return features(images, filters) @ head + bias


@functools.cache
def onnx_bytes():
    """The linear model, from uint8 pixels."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    make, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        make.make_node("Cast", ["images"], ["floats"], to=kinds.FLOAT),
        make.make_node("Flatten", ["floats"], ["flat"]),
        make.make_node("Gemm", ["flat", "w", "b"], ["logits"]),
    ]
    given = make.make_tensor_value_info("images", kinds.UINT8, IMAGES)
    made = make.make_tensor_value_info("logits", kinds.FLOAT, LOGITS)
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in zip("wb", linear(), strict=True)]
    graph = make.make_graph(nodes, "linear", [given], [made], tensors)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 21)], ir_version=10).SerializeToString()


@functools.cache
def jax_bytes():
    """The convolution as a serialised jax.export, from uint8 pixels, for any batch."""
    import jax
    import jax.numpy as jnp
    from jax import export, lax

    filters, head, bias = convolution()

    def apply(images):
        x = images.astype(jnp.float32) / 255.0
        x = lax.conv_general_dilated(x, filters, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x).reshape(-1, 4, 2, 4, 2, 8).mean((2, 4))
        return x.reshape(-1, 128) @ head + bias[None]

    (batch,) = export.symbolic_shape("batch")
    given = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.uint8)
    return bytes(export.export(jax.jit(apply), platforms=("cpu",))(given).serialize())


def torch_module():
    """The convolution in PyTorch, from float32 pixels in [0, 1], channels first."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    filters, head, bias = (torch.tensor(part) for part in convolution())

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 8, 3, padding=1, bias=False)
            self.head = torch.nn.Linear(128, 10)
            self.conv.weight.data = filters.permute(3, 2, 0, 1).contiguous()
            self.head.weight.data, self.head.bias.data = head.T.contiguous(), bias

        def forward(self, x):
            x = torch.nn.functional.avg_pool2d(torch.relu(self.conv(x)), 2)
            return self.head(x.permute(0, 2, 3, 1).flatten(1))

    return Net().eval()


def write_artefact(folder: Path, kind: str, runtime: str | None, name: str, content: bytes, **about):
    """An artefact around the bytes of a model of the digits."""

    def fill(partial):
        (partial / name).write_bytes(content)
        manifest = {
            "format": kind, "runtime": runtime, "model": name, "task": "classification", "arm": "teacher",
            "input": {"name": "images", "shape": IMAGES, "dtype": "uint8"},
            "output": {"name": "logits", "shape": LOGITS, "dtype": "float32"},
            "context": None, "labels": [*"0123456789"], "preprocessing": None, "params": 650, "weights_bytes": 2600,
            "file_bytes": len(content), "config_sha256": HASH, "params_sha256": HASH,
            "data": {"task": "classification", "name": "digits"}, "parity": None,
        }  # fmt: skip
        return {**manifest, **about}

    return artefact.write(folder, fill).folder
