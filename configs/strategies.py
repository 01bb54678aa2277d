"""Strategies of distillation on digits: who teaches, in which order, and what counts for how much.

    kdjax distill --config configs/strategies.py:born_again
    kdjax distill --config configs/strategies.py:simkd --workdir runs/simkd

Teacher, student, data and lengths are those of configs/digits.py; without a variant, so is everything else. Variants:
  assistant               a model between teacher and student in size learns first and then teaches (Mirzadeh et al.
                          2020).
  born_again              three generations: each student is taught by the one before it (Furlanello et al. 2018).
  simkd                   the student ends in its teacher's own classifier and learns the feature that this one reads
                          (Chen et al. 2022). It has more parameters than the control: a projector to that feature.
  ema_teacher             no teacher: the student follows its own moving average (Tarvainen & Valpola 2017).
  exits                   no teacher: classifiers on earlier layers follow the last one, and leave after training (Zhang
                          et al. 2019, "Be your own teacher").
  past_predictions        no teacher: the labels give way to what the student itself said when it last met the example
                          (Kim et al. 2021).
  curriculum_temperature  the temperature learns against the student, ever harder over the first ten epochs (Li et al.
                          2023).
  mutual                  no teacher: two students of the same kind learn together, each from the other (Zhang et al.
                          2018).
  responsive              an example counts for as much as the teacher knows of it and the student does not yet.
  uncertainty             soft targets, similarities and labels, weighed by learned uncertainties (Kendall et al. 2018).
  dwa                     the same terms, weighed by how slowly each falls (Liu et al. 2019).
  features_then_logits    stages: where the teacher looks, then what it says, then the labels.

Those without a teacher train one all the same, for the table to compare with. No variant's numbers were tuned: they
show how a strategy is set, not what it gains at its best. One seed of each, half a minute to a minute on two CPU cores,
is in docs/results.md: none differs from the student alone by more than noise.
"""

from ml_collections import ConfigDict

from kdjax import config as configs
from kdjax.errors import unknown

VARIANTS = (
    "",
    "assistant",
    "born_again",
    "simkd",
    "ema_teacher",
    "exits",
    "past_predictions",
    "curriculum_temperature",
    "mutual",
    "responsive",
    "uncertainty",
    "dwa",
    "features_then_logits",
)


def get_config(arg: str = "") -> ConfigDict:
    if arg not in VARIANTS:
        raise unknown("variant of strategies.py", arg, filter(None, VARIANTS))
    config = configs.default()
    if arg == "assistant":
        config.assistants = {"middle": {"name": "cnn", "options": {"widths": (16, 32, 48), "strides": (1, 2, 2)}}}
    if arg == "born_again":
        config.generations = 3
    if arg == "simkd":
        config.student.reuse_classifier = True
        only(config, simkd={"student_taps": ("projected",), "projector": "none"})
    if arg == "ema_teacher":
        config.train.ema = 0.99
        only(config, ema_kl={}, ce={})
    if arg == "exits":
        only(config, exits={}, ce={})
    if arg == "past_predictions":
        only(config, past_predictions={"share": {"schedule": "linear", "init": 0.0, "end": 0.8}})
    if arg == "curriculum_temperature":
        rising = {"schedule": "cosine", "init": 0.0, "end": 1.0, "length_epochs": 10}
        only(config, curriculum_kl={"weight": 0.9, "reversal": rising}, ce={"weight": 0.1})
    if arg == "mutual":
        only(config, mutual={}, ce={})
        config.peers = {"twin": {}}
    if arg == "responsive":
        config.losses.kl.examples = "responsive"
    if arg in ("uncertainty", "dwa"):
        config.balance = arg
        only(config, kl={"temperature": 4.0}, similarity={"weight": 1000.0}, ce={})
    if arg == "features_then_logits":
        config.stages = {
            "1_features": {"percent": 30, "losses": {"attention_transfer": {"weight": 1.0}, **off("kl", "ce")}},
            "2_logits": {"percent": 50, "losses": {"kl": {"weight": 1.0}, **off("ce")}},
            "3_task": {"losses": {"ce": {"weight": 1.0}, **off("kl")}},
        }
    return config


def only(config: ConfigDict, **terms: dict) -> None:
    """Sets the objective to these terms, with weight 1 where they give no other."""
    for term in config.losses.values():
        term.weight = 0.0
    for name, options in terms.items():
        config.losses[name].update({"weight": 1.0, **options})


def off(*terms: str) -> dict:
    """These terms switched off, in a stage."""
    return {name: {"weight": 0.0} for name in terms}
