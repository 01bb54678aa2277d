"""kdjax's distillation step against a plain PyTorch loop: same pair, weights, batches, arithmetic; losses and speed.

python tests/peers/torch_distill.py --pair vit --rounds 10

Each side lives in a process of its own and idles while the other one runs; they alternate, one chunk of steps each, so
that whatever else the machine does falls on both. Prints one JSON object.
"""

import argparse
import functools
import json
import multiprocessing
import os
import time
from typing import NamedTuple

import numpy as np

from kdjax import host


class Pair(NamedTuple):
    """A teacher and a student on square colour images; a model is (name, options) of kdjax.models.build."""

    teacher: tuple[str, dict]
    student: tuple[str, dict]
    batch: int
    image: int = 32
    classes: int = 100


def _vit(width, depth, heads):
    return ("vit_s", {"patch": 4, "width": width, "depth": depth, "heads": heads})


PAIRS = {
    "vit": Pair(_vit(384, 12, 6), _vit(192, 6, 3), batch=32),
    "resnet": Pair(("resnet56", {}), ("resnet20", {}), batch=64),
    "tiny_vit": Pair(_vit(48, 2, 3), _vit(24, 1, 2), batch=4, image=8, classes=10),
    "tiny_resnet": Pair(("resnet14", {}), ("resnet8", {}), batch=8, image=8, classes=10),
}
TEMPERATURE, SOFT, HARD, RATE, MOMENTUM = 4.0, 0.9, 0.1, 0.05, 0.9
BATCHES = 4


def batches(pair):
    """The batches that both sides walk over: float32 images [b, h, w, c] and int32 labels [b]."""
    rng = np.random.default_rng(0)
    shape = (pair.batch, pair.image, pair.image, 3)
    return [
        (rng.normal(size=shape).astype(np.float32), rng.integers(0, pair.classes, pair.batch).astype(np.int32))
        for _ in range(BATCHES)
    ]


def clocks():
    """Wall and processor seconds; the latter are blind to other work on the machine, but count waiting threads too."""
    return np.array([time.perf_counter(), time.process_time()])


class KdjaxSide:
    """kdjax's own step; it also draws the weights that the other side copies."""

    def __init__(self, pair):
        import jax
        import optax

        from kdjax import objective, state, step
        from kdjax.model import from_nnx
        from kdjax.models import build

        def model(name, options):
            shape = (pair.image, pair.image, 3)
            return from_nnx(lambda rngs: build(name, classes=pair.classes, input_shape=shape, rngs=rngs, **options))

        teacher, student = model(*pair.teacher), model(*pair.student)
        terms = {"kl": {"weight": SOFT, "temperature": TEMPERATURE}, "ce": {"weight": HARD}}
        goal = objective.make_objective(terms)
        optimizer = optax.sgd(RATE, momentum=MOMENTUM)
        self.batches = [jax.device_put({"inputs": x, "labels": y}) for x, y in batches(pair)]
        self.teacher = jax.jit(teacher.init)(jax.random.key(1))
        warm = jax.jit(lambda v, x: {**v, "state": teacher.apply(v, x, train=True, key=jax.random.key(0))[1]})
        for i in range(40 if self.teacher["state"] else 0):  # running statistics of a network in use, not 0 and 1
            self.teacher = warm(self.teacher, self.batches[i % BATCHES]["inputs"])
        self.state = jax.jit(lambda key: state.create_state(student, optimizer, key))(jax.random.key(2))
        self.hparams = goal.hparams
        step = step.make_train_step(student, {"teacher": teacher}, goal, optimizer)
        self.step = jax.jit(step, donate_argnums=0)
        self.position = 0

    def weights(self):
        """(teacher, student) as flat dicts from path to array."""
        student = {"params": self.state.params, "state": self.state.model_state}
        return flatten(self.teacher), flatten(student)

    def run(self, steps):
        """The loss of each step, waited for, and its (wall, processor) seconds."""
        losses, seconds = [], []
        for _ in range(steps):
            start = clocks()
            batch = self.batches[self.position % BATCHES]
            self.state, metrics = self.step(self.state, {"teacher": self.teacher}, batch, self.hparams)
            losses.append(float(metrics["loss"][0]))
            seconds.append(clocks() - start)
            self.position += 1
        return losses, seconds


def flatten(variables):
    """{"params": nested, "state": nested} as one flat dict {"blocks.0.convs.0.kernel": array}."""
    import jax

    leaves = jax.tree.leaves_with_path([variables["params"], variables["state"]])
    return {".".join(str(key.key) for key in path[1:]): np.asarray(leaf) for path, leaf in leaves}


class TorchSide:
    """A plain eager loop in the given memory format."""

    def __init__(self, pair, weights, channels_last, threads):
        import torch
        from torch_models import CifarResNet, ViT, load

        torch.set_num_threads(threads)
        self.torch = torch
        self.format = torch.channels_last if channels_last else torch.contiguous_format

        def model(name, options, arrays):
            if name.startswith("vit"):
                module = ViT(**options, image=pair.image, classes=pair.classes)
            else:
                module = CifarResNet(int(name.removeprefix("resnet")), pair.classes)
            return load(module, arrays).to(memory_format=self.format)

        teacher, student = weights
        self.teacher = model(*pair.teacher, teacher).eval().requires_grad_(False)
        self.student = model(*pair.student, student).train()
        self.optimizer = torch.optim.SGD(self.student.parameters(), RATE, momentum=MOMENTUM, fused=True)
        self.batches = [
            (torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=self.format), torch.from_numpy(y).long())
            for x, y in batches(pair)
        ]
        self.position = 0

    def run(self, steps):
        """The loss of each step and its (wall, processor) seconds."""
        torch, f = self.torch, self.torch.nn.functional
        losses, seconds = [], []
        for _ in range(steps):
            start = clocks()
            x, y = self.batches[self.position % BATCHES]
            with torch.inference_mode():
                target = f.log_softmax(self.teacher(x) / TEMPERATURE, dim=-1)
            logits = self.student(x)
            soft = f.kl_div(f.log_softmax(logits / TEMPERATURE, dim=-1), target, reduction="batchmean", log_target=True)
            loss = SOFT * TEMPERATURE**2 * soft + HARD * f.cross_entropy(logits, y)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            seconds.append(clocks() - start)
            self.position += 1
        return losses, seconds


def _serve(pipe, make, threads, keep_memory):
    os.sched_setaffinity(0, range(threads))  # JAX has as many threads as it has cores
    if keep_memory:
        host.keep_freed_memory()
    side = make()
    while (request := pipe.recv()) is not None:
        name, *arguments = request
        pipe.send(getattr(side, name)(*arguments))


class Worker:
    """A side in a fresh process, called by method name; ``close`` ends it."""

    def __init__(self, settings, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(other, functools.partial(make, *arguments), *settings), daemon=True
        )
        self.process.start()
        other.close()

    def __call__(self, *request):
        self.pipe.send(request)
        return self.pipe.recv()

    def close(self):
        self.pipe.send(None)
        self.process.join()


def compare(pair, *, rounds, chunk, threads, keep_memory):
    """Alternates the sides; the first round warms up and is checked, not timed."""
    settings = threads, keep_memory
    kdjax = Worker(settings, KdjaxSide, pair)
    weights = kdjax("weights")
    sides = {
        "kdjax": kdjax,
        "torch contiguous": Worker(settings, TorchSide, pair, weights, False, threads),
    }
    if not pair.teacher[0].startswith("vit"):
        sides["torch channels_last"] = Worker(settings, TorchSide, pair, weights, True, threads)
    losses = {name: [] for name in sides}
    times = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            values, seconds = side("run", chunk)
            losses[name] += values
            times[name] += seconds if number else []
    for side in sides.values():
        side.close()
    ours = np.array(losses["kdjax"][:chunk])
    rivals = [name for name in sides if name != "kdjax"]
    difference = max(np.abs(np.array(losses[name][:chunk]) / ours - 1).max() for name in rivals)
    result = {
        "losses": {name: [round(value, 5) for value in values[:chunk]] for name, values in losses.items()},
        "worst_relative_loss_difference": float(difference),
    }
    for column, clock in enumerate(("wall", "processor")):
        taken = {name: np.array(seconds)[:, column].reshape(rounds, chunk) for name, seconds in times.items()}
        medians = {name: float(np.median(seconds)) for name, seconds in taken.items()}
        fastest = min(rivals, key=medians.__getitem__)
        ratios = np.median(taken[fastest], axis=1) / np.median(taken["kdjax"], axis=1)
        result[clock] = {
            "median_ms": {name: round(1e3 * seconds, 1) for name, seconds in medians.items()},
            "least_ms": {name: round(1e3 * float(seconds.min()), 1) for name, seconds in taken.items()},
            "fastest_torch": fastest,
            "kdjax_speed_over_torch": round(medians[fastest] / medians["kdjax"], 3),
            "same_by_round": [round(float(np.quantile(ratios, q)), 3) for q in (0, 0.5, 1)],
        }
    return result


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, default="vit")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--chunk", type=int, default=4, help="steps of one side before the other's turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--keep-memory", action="store_true", help="both sides keep freed memory, as the kdjax command does"
    )
    options = parser.parse_args()
    import jax
    import torch

    settings = {"threads": options.threads, "keep_memory": options.keep_memory}
    result = compare(PAIRS[options.pair], rounds=options.rounds, chunk=options.chunk, **settings)
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    print(json.dumps({"pair": options.pair, **versions, **settings, **result}))


if __name__ == "__main__":
    main()
