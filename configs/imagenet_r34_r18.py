"""ImageNet, ResNet-34 to ResNet-18 with the plain recipe of torchvision: 100 epochs, SGD, three drops of the rate.

    kdjax distill --config configs/imagenet_r34_r18.py --config.data.data_dir=DATA --workdir runs/r34_r18

DATA holds a tensorflow-datasets set ``imagenet_224``: ImageNet's images with the short side scaled to 256 pixels and
the centre of 224 x 224 cut out, stored as ArrayRecord. It is your own to prepare, since images must be of one size, and
it is held in memory (193 GB for the training split). Crops are therefore taken from the centre square, not from the
whole image as in the reference. ``--config.teacher.init=WORKDIR`` uses a teacher that is there already.

Reference (torchdistill, the same losses and rate, validation top-1): teacher 73.31 %, student alone 69.76 %, distilled
71.37 %. Not measured here.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import UserError

EPOCHS = 100


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise UserError(f"imagenet_r34_r18.py has no variant {arg!r}, nor any other: leave it out.")
    config = configs.default()
    config.data.update(name="tfds:imagenet_224", batch_size=256, eval_batch_size=512)
    config.data.augment.update(crop_padding=0, random_resized_crop=0.08, flip=True)
    config.teacher.update(name="resnet34", epochs=EPOCHS)
    config.teacher.options = {}
    config.student = {"name": "resnet18", "options": {}}
    config.train.update(epochs=EPOCHS, dtype="bfloat16")
    config.losses.kl.update(weight=0.5, temperature=1.0)
    config.losses.ce.update(weight=0.5)
    for optimizer in (config.teacher.optimizer, config.optimizer):
        optimizer.update(name="sgd", momentum=0.9, weight_decay=1e-4)
        optimizer.decay_mask = (".*",)  # as PyTorch does: biases and normalisations too
        optimizer.learning_rate = {"schedule": "step", "init": 0.1, "factor": 0.1, "boundaries_epochs": (30, 60, 90)}
    config.log.update(every=100, eval_every=5004)  # an epoch
    config.checkpoint.every = 5004
    return config
