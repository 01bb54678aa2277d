"""What ``kdjax check`` asks of the models themselves: do they fit the data, and do they know what they should?"""

import math

import jax
import numpy as np

from kdjax import metrics
from kdjax.data import packing, pipeline
from kdjax.data.packing import TextSplit
from kdjax.data.sources import Split
from kdjax.experiment import Experiment
from kdjax.model import Model, Variables, logits_of
from kdjax.recipes.check_identities import Check
from kdjax.tasks import classification, language

TEACHER_EXAMPLES = 512  # of the test set, to score a teacher on
TEACHER_TOKENS = 2**14  # the same of text, in whole windows
FAR_ABOVE_CHANCE = 0.25  # of the way from guessing the commonest class to knowing all
NEAR_CHANCE = 0.01  # relative, for the loss of a student that has learnt nothing


def fits_together(experiment: Experiment) -> Check:
    """Teachers, student and data agree on the shape of an example, where it has labels and the number of classes."""
    task, dataset = experiment.task, experiment.dataset
    two = np.zeros(2, np.int32)
    batch = jax.eval_shape(task.make_normalise(dataset), pipeline.gather(dataset.train, two, two))
    said = {}
    for name, model in {**experiment.teachers, "student": experiment.distilled}.items():
        variables = jax.eval_shape(model.init, jax.random.key(0))
        scores = jax.eval_shape(
            lambda v, x, model=model: logits_of(model.apply(v, x, train=False)[0]), variables, batch["inputs"]
        )
        said[name] = scores.shape
    classes = task.classes(experiment.config, dataset)
    ok = all(shape == (*batch["labels"].shape, classes) for shape in said.values())
    scores = ", ".join(f"{name} {list(shape[1:])}" for name, shape in said.items())
    value = f"inputs {list(jax.tree.leaves(batch['inputs'])[0].shape[1:])}, classes {classes}, scores of {scores}"
    return Check("classes and shapes agree", ok, value, "each model scores every class of the data, at every label")


def teacher_knows(experiment: Experiment, name: str, variables: Variables | None) -> Check:
    """A teacher that was given knows some of the test data: it saw such data, prepared in this way."""
    title, knows = _KNOWS[experiment.config.task]
    title = f"{name} {title}"
    if variables is None:
        return Check(title, None, None, "not checked: the teacher is trained in this run")
    return knows(experiment, name, variables)._replace(name=title)


def _knows_classes(experiment: Experiment, name: str, variables: Variables) -> Check:
    dataset, test = experiment.dataset, experiment.dataset.test
    labelled = np.flatnonzero(test.labels >= 0)
    if not len(labelled):
        return Check("", None, None, "not checked: the test split has no labels")
    chosen = np.random.default_rng(0).permutation(labelled)[:TEACHER_EXAMPLES]
    some = Split(test.inputs[chosen], test.labels[chosen])
    batch_size = experiment.config.data.eval_batch_size
    logits = classification.make_score(experiment.teachers[name], dataset, experiment.mesh, batch_size)(variables, some)
    if not np.isfinite(logits).all():
        return Check("", False, "not finite", f"{name}'s scores are NaN or Inf: its checkpoint is broken")
    accuracy = metrics.classification(logits, some.labels)["accuracy"]
    chance = float(np.bincount(some.labels).max() / len(some.labels))
    wanted = chance + FAR_ABOVE_CHANCE * (1.0 - chance)
    meaning = (
        f"accuracy on {len(chosen)} test examples, where guessing gives {chance:.3f} (at least {wanted:.3f}); "
        "if it fails, the teacher learnt other images, other classes or another preprocessing"
    )
    return Check("", accuracy >= wanted, accuracy, meaning)


def _knows_text(experiment: Experiment, name: str, variables: Variables) -> Check:
    some = _some_windows(experiment)
    targets = some.tokens[:, 1:][packing.target_mask(some)]
    shares = np.unique(targets, return_counts=True)[1] / len(targets)
    guessing, counting = math.log(experiment.classes), float(-np.sum(shares * np.log(shares)))
    wanted = min((1.0 - FAR_ABOVE_CHANCE) * guessing, counting)
    nll = _nll(experiment, experiment.teachers[name], variables, some)
    if not math.isfinite(nll):
        return Check("", False, "not finite", f"{name}'s scores are NaN or Inf: its weights are broken")
    meaning = (
        f"nats per token on {len(targets)} test tokens, where guessing costs {guessing:.3f} and knowing how often each "
        f"token comes {counting:.3f} (below {wanted:.3f}); if it fails, the teacher learnt other text or another "
        "tokenizer, or its weights are not of this model"
    )
    return Check("", nll < wanted, nll, meaning)


_KNOWS = {
    "classification": ("is far above chance", _knows_classes),
    "language": ("knows such text", _knows_text),
}


def starts_at_chance(experiment: Experiment, variables: Variables) -> Check:
    """A language model that has learnt nothing finds all tokens about equally likely.

    Args:
      experiment: the run.
      variables: the distilled student's weights before its first step.
    """
    title = "an untrained student guesses"
    if experiment.config.student.init:
        return Check(title, None, None, "not checked: the student begins with the weights that student.init names")
    some, guessing = _some_windows(experiment), math.log(experiment.classes)
    nll = _nll(experiment, experiment.distilled, variables, some)
    meaning = (
        f"nats per token before the first step, which should be those of guessing, {guessing:.4f} (within "
        f"{NEAR_CHANCE:.0%}); if it fails, training begins with unlearning what the initial weights prefer"
    )
    return Check(title, abs(nll / guessing - 1.0) <= NEAR_CHANCE, nll, meaning)


def _some_windows(experiment: Experiment) -> TextSplit:
    """Whole windows of the test split, chosen at random."""
    test = experiment.dataset.test
    count = max(TEACHER_TOKENS // experiment.dataset.context, 1)
    chosen = np.random.default_rng(0).permutation(pipeline.length(test))[:count]
    return TextSplit(*(array[chosen] for array in test))


def _nll(experiment: Experiment, model: Model, variables: Variables, some: TextSplit) -> float:
    config = experiment.config
    evaluate = language.make_evaluate(
        model,
        experiment.dataset,
        experiment.mesh,
        config.data.eval_batch_size,
        tokens_per_chunk=config.train.tokens_per_chunk,
    )
    return evaluate(variables, split=some)["nll"]
