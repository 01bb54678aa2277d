"""RepDistiller's train_distill with its DistillKL and its ResNets, from a clone of its repository."""

import contextlib
import io
import os
import sys
from types import SimpleNamespace

from alternate import Side
from torch_distill import bundled, prepare
from vision_pair import HARD, SOFT, TEMPERATURE

FOLDER = "REPDISTILLER"  # the environment variable that names the clone


def repdistiller_side(pair, weights, *, channels_last=False):
    """An epoch of one batch a step: so the loop tells each loss, at a cost too small to measure."""
    import torch

    sys.path.insert(0, os.environ[FOLDER])
    try:
        from distiller_zoo import DistillKL
        from helper.loops import train_distill
        from models import model_dict
    finally:
        sys.path.remove(os.environ[FOLDER])

    def model(pair, name, options, arrays):
        ours, theirs = bundled(pair, name, options, arrays), model_dict[name](num_classes=pair.classes)
        theirs.load_state_dict({_renamed(key, len(ours.blocks)): value for key, value in ours.state_dict().items()})
        return theirs

    teacher, student, optimizer, batches = prepare(pair, weights, channels_last, model)
    modules = torch.nn.ModuleList([student, teacher])
    criteria = [torch.nn.CrossEntropyLoss(), DistillKL(TEMPERATURE), None]
    options = SimpleNamespace(distill="kd", gamma=HARD, alpha=SOFT, beta=0.0, print_freq=100)

    def step():
        with contextlib.redirect_stdout(io.StringIO()):
            _, loss = train_distill(0, [(*next(batches), None)], modules, criteria, optimizer, options)
        return loss

    return Side(step)


_LAYERS = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
_PARTS = {"convs.0": "conv1", "convs.1": "conv2", "norms.0": "bn1", "norms.1": "bn2"}
_PARTS |= {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}


def _renamed(key, blocks):
    """``blocks.3.convs.0.weight`` as ``layer2.0.conv1.weight`` and so on, for a stage has a third of the blocks."""
    path, _, leaf = key.rpartition(".")
    if path in _LAYERS:
        return f"{_LAYERS[path]}.{leaf}"
    _, number, part = path.split(".", 2)
    stage, place = divmod(int(number), blocks // 3)
    return f"layer{stage + 1}.{place}.{_PARTS[part]}.{leaf}"
