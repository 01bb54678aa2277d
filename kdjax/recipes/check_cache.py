"""What ``kdjax check`` asks of a cache of a teacher's signals: is it whole, of this run, and what the teacher says?"""

from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from kdjax import checkpoint, sharding
from kdjax.data import cache, pipeline
from kdjax.data.cache import Cache
from kdjax.errors import UserError
from kdjax.experiment import MAIN, Experiment
from kdjax.model import Variables, logits_of
from kdjax.recipes.check_identities import Check
from kdjax.tasks import language

WINDOWS, PLACES = 8, 256  # of the sample: windows, as far as the mesh divides them, and places in all of them
# Of the kept log-probabilities, relative where they are below -1. float16 rounds by at most 5e-4; what is computed in
# bfloat16 differs from batch to batch. Another teacher is off by about 1.
SAME = {"float32": 2e-3, "bfloat16": 0.1}
DEVIATIONS = 8.0  # that the mean of random draws may be off; they are few, and their distribution has a long tail


def is_whole(found: Cache) -> Check:
    """Every record can be read and has its digest."""
    try:
        summary = cache.verify(found.folder)
    except UserError as error:
        return Check("the cache is whole", False, "damaged", str(error))
    value = f"{summary.form}, {summary.tokens} tokens in {summary.shards} files, {summary.bytes_per_token:.1f} B each"
    return Check("the cache is whole", True, value, f"all {summary.examples} records were read, and their digests hold")


def is_of_this_run(experiment: Experiment, variables: Variables | None) -> Check:
    """The cache is of the run's data and tokenizer and, where its weights are given, of its teacher."""
    assert experiment.signals, "only a run with a cache is asked"
    title, digest = "the cache is of this run", checkpoint.digest(variables) if variables is not None else None
    try:
        language.check_cache(experiment.signals, experiment.dataset, digest)
    except UserError as error:
        return Check(title, False, "another", str(error))
    what = "data, tokenizer and teacher" if digest else "data and tokenizer (the teacher: where teacher.init names it)"
    return Check(title, True, experiment.signals.manifest.teacher_sha256[:16], f"digests agree of {what}")


def agrees(experiment: Experiment, variables: Variables | None) -> Check:
    """A sample of the signals is what the teacher says when it is asked.

    Of ``top_k`` the log-probabilities are compared. Of ``sample`` the mean log-probability of the classes drawn, which
    the teacher must all find possible, is compared with its expectation, in standard deviations of that mean.

    Args:
      experiment: a run with a cache.
      variables: the teacher's weights on the mesh; ``None`` where they are not known.
    """
    title = "the cache agrees with the teacher"
    if variables is None:
        return Check(title, None, None, "not checked: the teacher's weights are not given in teacher.init")
    assert experiment.signals, "only a run with a cache is asked"
    manifest = experiment.signals.manifest
    ways = sharding.batch_ways(experiment.mesh)
    order = np.random.default_rng(0).permutation(manifest.examples)
    ids = np.resize(order, -(-WINDOWS // ways) * ways).astype(np.int32)
    step = max(len(ids) * manifest.positions // PLACES, 1)
    kept = cache.read(experiment.signals, ids)
    classes, log_probs = (kept[name].reshape(-1, manifest.width)[::step] for name in ("ids", "log_probs"))
    said = _log_probs(experiment, variables, ids, step)
    of_kept, there = np.take_along_axis(said, classes, axis=-1), np.isfinite(log_probs)
    if manifest.form == "top_k":
        # A class that float32 finds impossible is -inf on both sides, or compared as the least that float32 has.
        apart = np.abs(np.where(there, log_probs - of_kept, 0.0)) / np.maximum(np.abs(of_kept), 1.0)
        value, most = float(np.max(np.mean(apart, axis=-1))), SAME[experiment.config.train.dtype]
        meaning = (
            f"the largest difference of a token's log-probabilities from the teacher's, relative (at most {most:g})"
        )
        return Check(title, value <= most, value, meaning)
    value = _deviations(said, of_kept, np.where(there, np.exp(log_probs), 0.0), manifest.width)
    possible = bool((np.exp(of_kept[there]) > 0).all())
    meaning = (
        "mean log-probability of the tokens drawn from what the teacher expects of its own draws, in standard "
        f"deviations (at most {DEVIATIONS:g}), and all of them possible"
    )
    return Check(title, possible and value <= DEVIATIONS, value, meaning)


def _deviations(said: NDArray[Any], of_kept: NDArray[Any], shares: NDArray[Any], draws: int) -> float:
    """How far the mean log-probability of all draws is from its expectation, in standard deviations."""
    p = np.exp(said.astype(np.float64))
    log_p = np.where(p > 0, said, 0.0)
    mean = np.sum(p * log_p, axis=-1)
    variance = np.sum(p * log_p**2, axis=-1) - mean**2
    found = np.sum(np.where(shares > 0, shares * of_kept, 0.0), axis=-1)
    spread = np.sqrt(np.sum(np.maximum(variance, 0.0)) / draws) + 1e-4 * len(said)  # what is rounded is off everywhere
    return float(abs(np.sum(found - mean)) / spread)


def _log_probs(experiment: Experiment, variables: Variables, ids: NDArray[np.int32], step: int) -> NDArray[Any]:
    """What the teacher says of every ``step``-th place of some training windows, all classes: [places, classes]."""
    model, normalise = experiment.teachers[MAIN], experiment.task.make_normalise(experiment.dataset)

    def said(variables: Variables, batch: Any) -> jax.Array:
        outputs = model.apply(variables, normalise(batch)["inputs"], train=False)[0]
        some = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])[::step]
        return jax.nn.log_softmax(logits_of(outputs._replace(hidden=some)), axis=-1)

    batch = sharding.put_batch(pipeline.gather(experiment.dataset.train, ids, np.zeros_like(ids)), experiment.mesh)
    jitted = jax.jit(said, out_shardings=sharding.replicated(experiment.mesh))
    return np.asarray(jax.device_get(jitted(variables, batch)))
