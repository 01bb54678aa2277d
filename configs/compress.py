"""Smaller than the student, on digits: pruned, factorised, thinned out, quantised, and distilled after each step.

    kdjax compress --config configs/compress.py
    kdjax compress --config configs/compress.py:int4 --workdir runs/int4
    kdjax bench compress --seeds 3 --config configs/compress.py:int4

Teacher, student and data are those of configs/digits.py. Test accuracy in percent, as made / trained alone / distilled,
on 2 cores of an AMD EPYC, one to two minutes a seed (more: docs/results.md):

  int4, 3 seeds                                 96.84 / 98.14 / 98.05 (97.96 before)
  pruned, 5 seeds                               25.96 / 97.77 / 98.05
  pruned with --config.data.labels=0.1          25.96 / 93.59 / 97.94
  low_rank, 5 seeds                             38.61 / 97.99 / 98.61
  low_rank with --config.data.labels=0.1        38.61 / 95.15 / 98.61

Variants:
  chain     distil, prune, distil, quantise-aware distil: the student loses half of its channels, then its weights and
            activations become int8. Also without a variant.
  int4      the student with int4 weights, taught by itself in float32, from its outputs alone (no labels).
  int8      the student with int8 weights and activations, likewise.
  fp8       the student with fp8 weights and activations, likewise.
  pruned    the teacher without three quarters of its channels, taught by the whole teacher.
  low_rank  the teacher's layers in two factors with a tenth of its parameters, taught by the whole teacher.
  sparse    the student with nine tenths of its weights at zero.
  quick     the chain with few epochs, to see that it runs; the numbers mean nothing.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "chain", "int4", "int8", "fp8", "pruned", "low_rank", "sparse", "quick")
SOFT = {"kl": {"weight": 1.0, "temperature": 2.0}, "ce": {"weight": 0.0}}  # the teacher's outputs, no labels


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of compress.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.compress = steps(arg)
    if arg == "quick":
        config.teacher.epochs = config.train.epochs = 3
        for step in config.compress.values():
            step.epochs = 2
    return config


def steps(arg: str) -> dict:
    rate = lambda peak: {"schedule": "cosine", "init": peak, "end": 0.0, "warmup_percent": 5.0}
    quantised = lambda **rule: {
        "method": "quantise",
        "options": rule,
        "losses": SOFT,
        "epochs": 30,
        "learning_rate": rate(1e-3),
    }
    pruned = {"method": "prune", "options": {"keep": {"channels": 0.5}}, "epochs": 30, "learning_rate": rate(2e-3)}
    if arg == "int4":
        return {"int4": quantised(weights="int4")}
    if arg == "int8":
        return {"int8": quantised(weights="int8", activations="int8")}
    if arg == "fp8":
        return {"fp8": quantised(weights="fp8", activations="fp8")}
    if arg == "pruned":
        return {"pruned": {**pruned, "of": "teacher", "options": {"keep": {"channels": 0.25}}}}
    if arg == "low_rank":
        step = {"method": "low_rank", "of": "teacher", "options": {"budget": 0.1}}
        return {"low_rank": {**step, "epochs": 30, "learning_rate": rate(2e-3)}}
    if arg == "sparse":
        return {"sparse": {"method": "sparsify", "options": {"final": 0.9}, "epochs": 30, "learning_rate": rate(2e-3)}}
    return {"1_prune": pruned, "2_quantise": quantised(weights="int8", activations="int8")}
