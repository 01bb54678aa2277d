"""kdjax against its peers on tiny sizes: the same logits, and the same losses step by step."""

import functools
import os

import big_vision_step
import jax
import numpy as np
import pytest
import repdistiller
import side_by_side
import torch_distill
import vision_pair
from alternate import run

from kdjax.model import from_nnx
from kdjax.models import build

STEPS = 6


@functools.cache  # compiling is what takes the time
def kdjax_losses(task):
    """What a peer starts from on the tiny pair of a task: ``(pair, weights, losses)``."""
    ours, pairs, _ = side_by_side.TASKS[task]
    pair = pairs[f"tiny_{task}"]
    side = ours(pair)
    losses, _ = run(side, STEPS)
    return pair, side.weights, losses


def agree(losses, expected):
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert len(set(losses.round(4))) > 3  # the updates act: no step repeats another's loss


def needs_clone(variable, what):
    if variable not in os.environ:
        pytest.skip(f"the environment variable {variable} does not name a clone of {what}")


@pytest.mark.parametrize("task", ["vit", "resnet"])
def test_plain_pytorch(task):
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    pair, weights, losses = kdjax_losses(task)
    for channels_last in (False, True):
        agree(losses, run(torch_distill.torch_side(pair, weights, channels_last=channels_last), STEPS)[0])


def test_repdistiller():
    pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")
    needs_clone(repdistiller.FOLDER, "RepDistiller")
    pair, weights, losses = kdjax_losses("resnet")
    agree(losses, run(repdistiller.repdistiller_side(pair, weights), STEPS)[0])


def test_torchdistill():
    pytest.importorskip("torchdistill", reason="torchdistill is not installed: pip install torchdistill")
    pair, weights, losses = kdjax_losses("resnet")
    agree(losses, run(side_by_side.torchdistill_side(pair, weights), STEPS)[0])


def test_trl():
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    pair, weights, losses = kdjax_losses("qwen2_kl")
    agree(losses, run(side_by_side.trl_side(pair, weights), STEPS)[0])


@pytest.mark.parametrize("task", ["qwen2", "qwen2_kl"])
def test_tunix(task):
    pytest.importorskip("tunix", reason="tunix is not installed: pip install google-tunix")
    pair, weights, losses = kdjax_losses(task)
    with jax.numpy_rank_promotion("allow"):
        agree(losses, run(side_by_side.tunix_side(pair, weights), STEPS)[0])


def test_big_vision():
    needs_clone(big_vision_step.FOLDER, "big_vision")
    pytest.importorskip("tensorflow", reason="big_vision's modules import TensorFlow: pip install tensorflow-cpu")
    with jax.numpy_rank_promotion("allow"):
        pair, weights, losses = kdjax_losses("big_vision_vit")
        agree(losses, run(side_by_side.big_vision_side(pair, weights), STEPS)[0])


@pytest.mark.parametrize("pair", ["tiny_vit", "tiny_resnet"])
@pytest.mark.parametrize("train", [False, True])
def test_logits_agree(pair, train):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")

    pair = vision_pair.PAIRS[pair]
    name, options = pair.teacher
    shape = (pair.image, pair.image, 3)
    model = from_nnx(lambda rngs: build(name, classes=pair.classes, input_shape=shape, rngs=rngs, **options))
    rng = np.random.default_rng(1)
    # every leaf away from its initial value, so that no two of them can be swapped unseen
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf) + rng.uniform(-0.1, 0.1, leaf.shape).astype(np.float32),
        model.init(jax.random.key(0)),
    )
    images, _ = vision_pair.batches(pair)[0]
    outputs, _ = model.apply(variables, images, train=train, key=jax.random.key(0))

    module = torch_distill.bundled(pair, name, options, vision_pair.flatten(variables)).train(train)
    with torch.no_grad():
        expected = module(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4 * np.abs(expected).max())
