from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = ("", "quick")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of fashion_mnist.py", arg, filter(None, VARIANTS))
    config = configs.default()
    config.data.update(name="tfds:fashion_mnist", batch_size=128, eval_batch_size=500)
    config.data.augment.update(crop_padding=2, flip=True)
    config.teacher.options = {"widths": (32, 64, 128), "strides": (2, 1, 2), "dense": 128, "dropout": 0.3}
    config.teacher.epochs = 12
    config.teacher.optimizer.weight_decay = 0.05
    config.student.options = {"widths": (8, 16, 32), "strides": (2, 2, 1)}
    config.train.epochs = 20
    config.log.update(every=50, eval_every=469)
    config.checkpoint.every = 469
    if arg == "quick":
        config.teacher.epochs = 1
        config.train.epochs = 1
    return config
