"""A curriculum on digits: the distilled student sees the easiest examples first, then ever more, then all.

    kdjax distill --config configs/curriculum.py --workdir runs/curriculum
    kdjax distill --config configs/curriculum.py:random
    kdjax distill --config configs/curriculum.py --config.data.curriculum.pacing=step

How hard an example is, the teacher says once: its cross-entropy with the label. The student begins with the easiest
30 %; their share grows evenly until, at half of the run, all are in, and what follows are the ordinary epochs (Hacohen
& Weinshall 2019). Models, losses and lengths are those of configs/digits.py. The student alone sees ordinary batches
throughout.

Variants:
  hard_first  the hardest examples first (the paper's anti-curriculum).
  random      pools that grow alike, of examples in a random order: what is left of the gain here does not come from
              easiness (the paper's control).

Results of one seed (half a minute to a minute on two CPU cores): docs/results.md. No difference beyond noise.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "hard_first", "random")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of curriculum.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.data.curriculum.update(pacing="linear", order=arg or "easy_first")
    return config
