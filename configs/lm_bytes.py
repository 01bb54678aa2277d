"""Language models on bytes: a decoder of 0.67 million parameters teaches one of a fifth of that, on the source text of
Python's own standard library.

    kdjax distill --config configs/lm_bytes.py
    kdjax cache --config configs/lm_bytes.py --workdir runs/lm_bytes
    kdjax distill --config configs/lm_bytes.py:cached --config.teacher.init=runs/lm_bytes \\
        --config.teacher.cache=runs/lm_bytes/cache

Measured with seed 0 on 2 cores of an AMD EPYC, Python 3.11.7, commit 7688222, nothing else running: 9 minutes. Bits per
byte of 583,248 test bytes: teacher 1.940, student alone 2.192, distilled 2.091. More: docs/results.md.

Variants:
  cached     the distilled student learns from what the teacher said beforehand, its 32 likeliest bytes and the rest.
  quick      a few dozen steps of everything, to see that it runs; the numbers mean nothing.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "cached", "quick")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of lm_bytes.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.task = "language"
    config.data.update(name="stdlib", tokenizer="bytes", context=256, batch_size=8, eval_batch_size=32)
    config.teacher.update(name="decoder", epochs=0, steps=2500)
    config.teacher.options = {"width": 128, "layers": 3, "heads": 4, "mlp_width": 352, "qk_norm": True}
    config.student.name = "decoder"
    config.student.options = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 160, "qk_norm": True}
    config.losses.kl.update(weight=0.9, temperature=1.0)
    config.losses.ce.weight = 0.1
    rate = lambda peak: {"schedule": "cosine", "init": peak, "end": 0.0, "warmup_percent": 10.0}
    config.teacher.optimizer.update(learning_rate=rate(3e-3), clip_norm=1.0)
    config.optimizer.update(learning_rate=rate(5e-3), clip_norm=1.0)
    config.train.update(epochs=0, steps=1500)
    config.checkpoint.every = 500
    config.log.update(every=20, eval_every=750)
    if arg == "cached":
        config.losses.kl.weight = 0.0
        config.losses.top_k.weight = 0.9
    if arg == "quick":
        config.data.options = {"modules": "a*.py"}
        config.teacher.steps = 20
        config.train.steps = 20
    return config
