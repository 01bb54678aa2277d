"""Digits (the default experiment): a CNN teaches one with 4 % of its parameters on scikit-learn's 1,797 scans.

    kdjax distill --config configs/digits.py
    kdjax distill --config configs/digits.py:labels10 --workdir runs/labels10

Variants:
  quick      a few epochs of everything, to see that it runs; the numbers mean nothing.
  labels10   the students see 10 % of the labels. The control learns from those alone; the distilled student also hears
             the teacher on the unlabelled rest.
  two_stage  the distilled student first matches the teacher's softened outputs (T = 8), then learns the plain task.

Results over five seeds, with times: docs/results.md.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "quick", "labels10", "two_stage")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of digits.py", arg, filter(None, VARIANTS))
    config = configs.default()
    if arg == "quick":
        config.teacher.epochs = 5
        config.train.epochs = 5
    if arg == "labels10":
        config.data.labels = 0.1
    if arg == "two_stage":
        config.stages = {
            "1_soft": {"percent": 70, "losses": {"kl": {"weight": 1.0, "temperature": 8.0}, "ce": {"weight": 0.0}}},
            "2_task": {"losses": {"kl": {"weight": 0.0}, "ce": {"weight": 1.0}}},
        }
    return config
