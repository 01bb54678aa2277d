"""Chains: the models between the teacher and the student, each taught by the one before it.

Assistants are models of shrinking size (Mirzadeh et al. 2020, "Improved knowledge distillation via teacher assistant");
generations are students that teach their successors, of the same architecture and other initial weights (Furlanello
et al. 2018, "Born-again neural networks"). Each link is an arm: the distilled student of an experiment of its own.
"""

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from kdjax.errors import UserError

# Between the seeds of neighbouring links: farther apart than those of a population's members, which count from 0.
_SEEDS_APART = 1 << 16


def configs_of(config: ConfigDict, taken: Collection[str], student: str) -> dict[str, ConfigDict]:
    """The config of each link's experiment by arm, in the order of training; the last is that of ``student``.

    In each, the link is the student, and the link before it the only teacher (the first has the teachers of the run);
    losses, optimiser and length are those of the run. Empty where there is nothing between teacher and student.

    Args:
      config: of the run.
      taken: the arms that there are without a chain.
      student: the arm of the distilled student.

    Raises:
      UserError: a number of generations below 1, an assistant without a model, or one whose arm's name is taken.
    """
    if config.generations < 1:
        raise UserError(f"generations={config.generations} and should be 1 or more: 1 distils the student once.")
    if config.generations > 1 and config.student.reuse_classifier:
        raise UserError(
            "student.reuse_classifier takes over the teacher's own classifier, and the teacher of a later generation "
            "has taken over its own: set generations=1."
        )
    sections: dict[str, Mapping[str, Any]] = {}
    for name, section in sorted(config.assistants.items()):
        if "name" not in section:
            raise UserError(f"assistants.{name} has no model: give it a name, such as 'cnn'.")
        sections[f"assistant_{name}"] = {"options": {}, **section.to_dict()}
    for number in range(1, config.generations):
        sections[f"generation_{number}"] = config.student.to_dict()
    for name in sections:
        if name in taken:
            raise UserError(f"{name} is the name of two arms: rename the assistant, or the teacher of that name.")
    if not sections:
        return {}
    found, before = {}, None
    for number, (name, section) in enumerate(sections.items(), 1):
        seed = config.student.seed + number * _SEEDS_APART
        found[name] = _link(config, before, {key: section[key] for key in ("name", "options")} | {"seed": seed})
        before = found[name]
    return found | {student: _link(config, before, config.student.to_dict())}


def inits(config: ConfigDict) -> dict[str, str]:
    """By arm, the checkpoint that stands for an assistant; "" where it is to be trained."""
    return {f"assistant_{name}": section.get("init", "") for name, section in config.assistants.items()}


def _link(config: ConfigDict, before: ConfigDict | None, student: Mapping[str, Any]) -> ConfigDict:
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.assistants, changed.generations = {}, 1
    changed.student = {"init": "", "reuse_classifier": False, **student}
    if before is not None:
        changed.teacher.update(name=before.student.name, init="")
        changed.teacher.options = before.student.options.to_dict()
        changed.more_teachers = {}
    return changed.lock()
