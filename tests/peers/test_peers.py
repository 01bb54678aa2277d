"""kdjax against PyTorch on tiny sizes: the same logits, and the same losses step by step."""

import jax
import numpy as np
import pytest
import torch_distill

from kdjax.model import from_nnx
from kdjax.models import build

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install -e '.[peers]'")


@pytest.mark.parametrize("pair", ["tiny_vit", "tiny_resnet"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_losses_agree_step_by_step(pair, channels_last):
    pair = torch_distill.PAIRS[pair]
    ours = torch_distill.KdjaxSide(pair)
    theirs = torch_distill.TorchSide(pair, ours.weights(), channels_last, threads=2)
    losses, _ = ours.run(6)
    expected, _ = theirs.run(6)
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert len({round(loss, 3) for loss in losses}) > 3  # the updates act: no step repeats another's loss


@pytest.mark.parametrize("pair", ["tiny_vit", "tiny_resnet"])
@pytest.mark.parametrize("train", [False, True])
def test_logits_agree(pair, train):
    from torch_models import CifarResNet, ViT, load

    pair = torch_distill.PAIRS[pair]
    name, options = pair.teacher
    shape = (pair.image, pair.image, 3)
    model = from_nnx(lambda rngs: build(name, classes=pair.classes, input_shape=shape, rngs=rngs, **options))
    rng = np.random.default_rng(1)
    # every leaf away from its initial value, so that no two of them can be swapped unseen
    variables = jax.tree.map(
        lambda leaf: np.asarray(leaf) + rng.uniform(-0.1, 0.1, leaf.shape).astype(np.float32),
        model.init(jax.random.key(0)),
    )
    images, _ = torch_distill.batches(pair)[0]
    outputs, _ = model.apply(variables, images, train=train, key=jax.random.key(0))

    if name.startswith("vit"):
        module = ViT(**options, image=pair.image, classes=pair.classes)
    else:
        module = CifarResNet(int(name.removeprefix("resnet")), pair.classes)
    load(module, torch_distill.flatten(variables)).train(train)
    with torch.no_grad():
        expected = module(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()
    np.testing.assert_allclose(outputs.logits, expected, atol=1e-4 * np.abs(expected).max())
