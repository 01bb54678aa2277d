"""How hard each training example is, as the teacher sees it: scored once, kept in the workdir."""

import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from numpy.typing import NDArray

from kdjax import checkpoint, cluster, sharding, train
from kdjax.data import pipeline
from kdjax.errors import UserError
from kdjax.experiment import MAIN, Experiment
from kdjax.model import Array, Variables
from kdjax.step import make_predict
from kdjax.tasks import classification

FILE = "difficulty.npz"


def scored(experiment: Experiment, teacher_variables: dict[str, Variables], workdir: Path | None = None) -> Experiment:
    """The experiment with the difficulty of its examples, where its config has a curriculum; else as it is."""
    if experiment.config.data.curriculum.pacing == "none":
        return experiment
    return experiment._replace(difficulty=scores(experiment, teacher_variables, workdir))


def scores(
    experiment: Experiment, teacher_variables: dict[str, Variables], workdir: Path | None = None
) -> NDArray[np.float32]:
    """The difficulty of each example that the student trains on.

    It is the main teacher's cross-entropy with the label, and where there is no label the entropy of its prediction,
    which is the cross-entropy that the teacher itself expects. The scores are kept in ``workdir/difficulty.npz`` with
    the SHA-256 of the teacher's weights and the size of the split, and read from there while both are the same, so that
    a resumed run sees the same order to the bit.

    Args:
      experiment: the run.
      teacher_variables: the teachers' weights by name.
      workdir: where to keep the scores; ``None`` to keep nothing.

    Returns:
      [examples] float32 in nats, in the order of ``experiment.student_train``.

    Raises:
      UserError: the teacher's outputs are not finite, or the file cannot be written.
    """
    digest = checkpoint.digest(teacher_variables[MAIN])
    size = len(experiment.student_train.labels)
    path = None if workdir is None else Path(workdir) / FILE
    stored = _read(path, digest, size) if path and cluster.is_first() else None
    # All processes go the same way, whether they see the file of the first one or not.
    has_stored, found = multihost_utils.broadcast_one_to_all(
        (np.int32(stored is not None), np.zeros(size, np.float32) if stored is None else stored)
    )
    if has_stored:
        return np.asarray(found)
    found = _score(experiment, teacher_variables[MAIN])
    bad = np.flatnonzero(np.isnan(found))
    if bad.size:
        raise UserError(f"the teacher's scores of training example {bad[0]} are NaN: it cannot say how hard that is.")
    if path and cluster.is_first():
        _write(path, digest, found)
    return found


def of_logits(logits: Array, labels: Array) -> Array:
    """[b] float32: the cross-entropy of ``logits`` [b, classes] with ``labels`` [b]; their entropy where it is -1."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    entropy = -jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), axis=-1)
    of_label = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(labels >= 0, -of_label, entropy)


def _score(experiment: Experiment, variables: Variables) -> NDArray[np.float32]:
    """One pass over the examples; only one number of each is brought to the host."""
    split, mesh = experiment.student_train, experiment.mesh
    predict = make_predict(experiment.teachers[MAIN], classification.make_normalise(experiment.dataset))
    jitted = jax.jit(
        lambda variables, batch: of_logits(predict(variables, batch), batch["labels"]),
        out_shardings=sharding.replicated(mesh),
    )
    placed = train.put_teachers({MAIN: variables}, mesh, experiment.config.sharding.teacher)[MAIN]
    found = np.empty(len(split.labels), np.float32)
    first = 0
    for batch in pipeline.eval_batches(
        split,
        batch_size=experiment.config.data.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        part = jax.device_get(jitted(placed, sharding.put_batch(batch, mesh)))
        found[first : first + len(part)] = part[: len(found) - first]  # what is cut off is padding
        first += len(part)
    return found


def _read(path: Path, digest: str, size: int) -> NDArray[np.float32] | None:
    """The scores of that teacher for as many examples; ``None`` where there are none that can be read."""
    try:
        with np.load(path) as file:
            if str(file["teacher_sha256"]) != digest or int(file["examples"]) != size:
                return None
            found = file["scores"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return found if found.shape == (size,) and found.dtype == np.float32 and not np.isnan(found).any() else None


def _write(path: Path, digest: str, found: NDArray[np.float32]) -> None:
    """Writes the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, teacher_sha256=digest, examples=len(found), scores=found)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another --workdir."
        ) from error
