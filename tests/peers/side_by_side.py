"""kdjax's distillation step beside its peers': same pair, weights, batches and arithmetic; losses and speed.

python tests/peers/side_by_side.py resnet torch repdistiller --threads 1 --keep-memory

Prints one JSON object. README.md says how to get each peer.
"""

import argparse
import json
import os
from functools import partial
from importlib import metadata

import big_vision_step
import language_pair
import vision_pair
from alternate import compare
from big_vision_step import big_vision_side
from repdistiller import repdistiller_side
from torch_distill import torch_side
from torchdistill_box import torchdistill_side
from trl_gkd import trl_side
from tunix_logit import tunix_side


def _formats(make):
    """Of convolutions PyTorch has two, and which one is faster depends."""
    return {"channels_last": partial(make, channels_last=True), "contiguous": make}


# The pairs, with kdjax's side of each and its peers, by the ways to run them.
VISION = vision_pair.kdjax_side, vision_pair.PAIRS
LANGUAGE = language_pair.kdjax_side, language_pair.PAIRS
TASKS = {
    "vit": (*VISION, {"torch": {"": torch_side}, "torchdistill": {"": torchdistill_side}}),
    "resnet": (
        *VISION,
        {
            "torch": _formats(torch_side),
            "repdistiller": _formats(repdistiller_side),
            "torchdistill": _formats(torchdistill_side),
        },
    ),
    "qwen2_kl": (*LANGUAGE, {"trl": {"": trl_side}, "tunix": {"": tunix_side}}),
    "qwen2": (*LANGUAGE, {"tunix": {"": tunix_side}}),
    "big_vision_vit": (big_vision_step.kdjax_side, big_vision_step.PAIRS, {"big_vision": {"": big_vision_side}}),
}
PACKAGES = ("jax", "flax", "optax", "torch", "torchdistill", "trl", "transformers", "google-tunix")


def versions():
    """Of what is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", choices=TASKS)
    parser.add_argument("peers", nargs="+")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunk", type=int, default=4, help="steps of one side before the next one's turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--keep-memory", action="store_true", help="all sides keep freed memory, as the kdjax command does"
    )
    options = parser.parse_args()
    ours, pairs, able = TASKS[options.pair]
    for peer in options.peers:
        if peer not in able:
            parser.error(f"{peer} is no peer on {options.pair}: choose from {', '.join(able)}")
    settings = {"threads": options.threads, "keep_memory": options.keep_memory}
    peers = {peer: able[peer] for peer in options.peers}
    result = compare(ours, peers, pairs[options.pair], rounds=options.rounds, chunk=options.chunk, **settings)
    print(json.dumps({"pair": options.pair, **versions(), **settings, **result}))


if __name__ == "__main__":
    main()
