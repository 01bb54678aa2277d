"""Two teachers of different size on digits: averaged, or trusted example by example.

    kdjax distill --config configs/teachers.py --workdir runs/teachers
    kdjax distill --config configs/teachers.py:confidence --workdir runs/confidence

Beside the teacher of configs/digits.py a second one of a quarter of its parameters is trained; student, losses and
lengths are those of that file too. The table's teacher is both together.

Variants:
  averaged    the mean of both teachers' softened probabilities (Hinton et al. 2015, section 1). Also without a variant.
  confidence  each counts for as much as it knows the example's label (Zhang et al. 2022, eq. 4); without labels, as in
              the table, they count alike.

Data whose examples name their domain can ask one teacher for each: docs/data.md, "Domains".

Results of one seed (half a minute to a minute on two CPU cores): docs/results.md. No difference beyond noise.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "averaged", "confidence")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of teachers.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.more_teachers = {"small": {"name": "cnn", "options": {"widths": (16, 32, 64), "strides": (1, 2, 2)}}}
    config.teacher.combine = "confidence" if arg == "confidence" else "probabilities"
    return config
