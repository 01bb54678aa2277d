"""CIFAR-100 with the recipe of RepDistiller (Tian et al. 2020, "Contrastive representation distillation"), plain KD.

    kdjax distill --config configs/cifar100.py:res56_res20 --config.data.data_dir=DATA --workdir runs/res56_res20

DATA holds ``cifar100`` as tensorflow-datasets prepares it with ``file_format="array_record"``. The teacher is trained
first, with the same recipe; ``--config.teacher.init=WORKDIR`` uses one that is there already.

Variants, and the test accuracy (%) that RepDistiller's README gives for teacher, student alone, student distilled:
  res56_res20 (default)  72.34  69.06  70.66
  res32x4_res8x4         79.42  72.50  73.33
  wrn40_2_wrn16_2        75.61  73.26  74.92
Those are the best test epochs of each run; kdjax reports the last. Not measured here.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = {
    "res56_res20": ("resnet56", "resnet20"),
    "res32x4_res8x4": ("resnet32x4", "resnet8x4"),
    "wrn40_2_wrn16_2": ("wrn_40_2", "wrn_16_2"),
}
EPOCHS = 240


def get_config(arg: str = "") -> ConfigDict:
    pair = arg or "res56_res20"
    if pair not in VARIANTS:
        raise unknown("variant of cifar100.py", arg, VARIANTS)
    teacher, student = VARIANTS[pair]
    config = configs.default()
    config.data.update(name="tfds:cifar100", batch_size=64)
    config.data.augment.update(crop_padding=4, flip=True)
    config.teacher.update(name=teacher, epochs=EPOCHS)
    config.teacher.options = {}
    config.student = {"name": student, "options": {}}
    config.train.epochs = EPOCHS
    config.losses.kl.update(weight=0.9, temperature=4.0)
    config.losses.ce.update(weight=0.1)
    for optimizer in (config.teacher.optimizer, config.optimizer):
        optimizer.update(name="sgd", momentum=0.9, weight_decay=5e-4)
        optimizer.decay_mask = (".*",)  # as PyTorch does: biases and normalisations too
        optimizer.learning_rate = {
            "schedule": "step",
            "init": 0.05,
            "factor": 0.1,
            "boundaries_epochs": (150, 180, 210),
        }
    config.log.update(every=100, eval_every=782)  # about an epoch
    config.checkpoint.every = 3910
    return config
