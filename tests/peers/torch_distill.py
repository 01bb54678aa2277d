"""A plain eager PyTorch loop, on the bundled models in PyTorch."""

import itertools
import os
from typing import Any, NamedTuple

from alternate import Side
from vision_pair import HARD, MOMENTUM, RATE, SOFT, TEMPERATURE, batches


class Prepared(NamedTuple):
    """What any PyTorch side starts from: models with kdjax's weights, an optimiser, and batches without end."""

    teacher: Any
    student: Any
    optimizer: Any
    batches: Any


def bundled(pair, name, options, arrays):
    """The PyTorch model of a kdjax.models.build name, with kdjax's weights."""
    from torch_models import CifarResNet, ViT, load

    if name.startswith("vit"):
        return load(ViT(**options, image=pair.image, classes=pair.classes), arrays)
    return load(CifarResNet(int(name.removeprefix("resnet")), pair.classes), arrays)


def prepare(pair, weights, channels_last, model=bundled):
    """Prepared, in the given memory format; the optimiser is the fastest that PyTorch has."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    teacher, student = (
        model(pair, *one, arrays).to(memory_format=layout)
        for one, arrays in zip((pair.teacher, pair.student), weights, strict=True)
    )
    optimizer = torch.optim.SGD(student.parameters(), RATE, momentum=MOMENTUM, fused=True)
    images = lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    ready = [(images(x), torch.from_numpy(y).long()) for x, y in batches(pair)]
    return Prepared(teacher.eval().requires_grad_(False), student.train(), optimizer, itertools.cycle(ready))


def torch_side(pair, weights, *, channels_last=False):
    """The loop that one would write."""
    import torch
    import torch.nn.functional as F

    teacher, student, optimizer, batches = prepare(pair, weights, channels_last)

    def step():
        x, y = next(batches)
        with torch.inference_mode():
            target = F.log_softmax(teacher(x) / TEMPERATURE, dim=-1)
        logits = student(x)
        soft = F.kl_div(F.log_softmax(logits / TEMPERATURE, dim=-1), target, reduction="batchmean", log_target=True)
        loss = SOFT * TEMPERATURE**2 * soft + HARD * F.cross_entropy(logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Side(step)
