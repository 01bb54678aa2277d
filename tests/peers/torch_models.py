"""The bundled CIFAR ResNet and ViT in plain PyTorch, with kdjax's own names, so that weights copy one to one."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            ]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)])
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None
        self.shortcut_norm = nn.BatchNorm2d(outputs) if inputs != outputs else None

    def forward(self, x):
        y = F.relu(self.norms[0](self.convs[0](x)), inplace=True)
        y = self.norms[1](self.convs[1](y))
        y += self.shortcut_norm(self.shortcut(x)) if self.shortcut else x
        return F.relu(y, inplace=True)


class CifarResNet(nn.Module):
    def __init__(self, depth, classes, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for stage, width in enumerate((16, 32, 64)):
            for i in range((depth - 2) // 6):
                blocks.append(Block(inputs, width, 2 if stage and not i else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.stem_norm(self.stem(x)), inplace=True))
        return self.head(x.mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))


class Feedforward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.feedforward = Feedforward(width, 4 * width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feedforward(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width, depth, heads, patch, image, classes, channels=3):
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch * channels, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        b, c, h, w = x.shape
        p = self.patch
        x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        x = torch.cat([self.class_token.expand(b, 1, -1), self.embed(x)], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x)[:, 0]))


NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load(module, arrays):
    """Copies kdjax's arrays ({"blocks.0.convs.0.kernel": ...}) into the module of the same structure."""
    state = module.state_dict()
    wanted = {name for name in state if not name.endswith("num_batches_tracked")}
    for path, value in arrays.items():
        prefix, _, leaf = path.rpartition(".")
        value = np.array(value)
        if leaf == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        name = f"{prefix}.{NAMES.get(leaf, leaf)}" if prefix else leaf
        wanted.remove(name)
        state[name].copy_(torch.from_numpy(np.ascontiguousarray(value)))
    if wanted:
        raise ValueError(f"no array for {sorted(wanted)}")
    return module
