"""``kdjax cache``: what a teacher says of every training window, kept in files, so that it need not run again.

The files are written shard by shard, each whole or not at all: an interrupted run goes on where it was, and what it
gives is to the bit what an undisturbed one gives.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import build, checkpoint, chunks, cluster, memory, sharding, train
from kdjax.data import cache, pipeline, signal_codec
from kdjax.data.cache import Manifest, Summary
from kdjax.errors import UserError, unknown
from kdjax.experiment import MAIN, Experiment
from kdjax.losses import sparse
from kdjax.model import Array, Variables, logits_of
from kdjax.recipes import distill
from kdjax.tasks import language

FOLDER = "cache"  # in the workdir
_RECORD, _SHARD = 100, 2**17  # bytes of an ArrayRecord file beside its payloads, at most, as measured


def run(config: ConfigDict, workdir: Path, *, say: Callable[[str], None] = print) -> Summary:
    """Asks the teacher of a config (trained in ``workdir``, or ``teacher.init``) about every window of the training
    split, and writes ``workdir/cache``.

    Raises:
      UserError: not a language model, more than one teacher, a cache of something else in that place, or no space.
    """
    experiment = build.prepare(config)
    config = experiment.config
    _check(experiment)
    with distill.claimed(workdir, config):
        variables = distill.obtain_teachers(experiment, workdir, say=say)[MAIN].variables
        folder = Path(workdir) / FOLDER
        placed = train.put_teachers({MAIN: variables}, experiment.mesh, config.sharding.teacher)[MAIN]
        manifest = _manifest(experiment, variables, placed)
        _check_disk(manifest, workdir)
        if cluster.is_first():
            cache.prepare(folder, manifest)
        multihost_utils.sync_global_devices("the cache is prepared")
        _write(experiment, placed, folder, manifest, say)
        multihost_utils.sync_global_devices("the cache is written")
        return cache.verify(folder)


def table(summary: Summary, folder: Path) -> Table:
    """What a cache holds, for people."""
    shown = Table("cache", str(folder))
    for name, value in summary._asdict().items():
        shown.add_row(name.replace("_", " "), f"{value:.2f}" if isinstance(value, float) else f"{value}")
    return shown


def _check(experiment: Experiment) -> None:
    config = experiment.config
    if config.task != "language":
        raise UserError(f"kdjax cache is for language models, and task={config.task}: nothing is cached of others.")
    if len(experiment.teachers) > 1:
        raise UserError("kdjax cache asks one teacher: leave out more_teachers.")
    if config.teacher.cache:
        raise UserError("teacher.cache is what kdjax cache makes: leave it empty here.")
    if config.cache.form not in cache.FORMS:
        raise unknown("cache.form", config.cache.form, cache.FORMS)


def _manifest(experiment: Experiment, variables: Variables, placed: Variables) -> Manifest:
    config, dataset = experiment.config, experiment.dataset
    if config.cache.form == "top_k":
        width = min(config.cache.k, experiment.classes)
    else:
        split = experiment.dataset.train
        every = -(-pipeline.length(split) // _batch_size(config))
        some = next(_batches(experiment, [range(0, pipeline.length(split), every)]))[1]
        log_probs = np.asarray(sharding.to_host(_log_probs(experiment)(placed, some)))
        framing = _framing(config, experiment)
        try:
            width = signal_codec.samples_within(log_probs, config.cache.bytes_per_token - framing, config.cache.samples)
        except UserError as error:
            raise UserError(
                f"the files may take {framing:.1f} of cache.bytes_per_token={config.cache.bytes_per_token} beside what "
                f"they hold, which is less with more cache.examples_per_shard or a longer data.context: {error}"
            ) from error
    return Manifest(
        form=config.cache.form,
        width=width,
        vocabulary=experiment.classes,
        positions=dataset.context,
        examples=pipeline.length(dataset.train),
        examples_per_shard=config.cache.examples_per_shard,
        teacher_sha256=checkpoint.digest(variables),
        tokenizer_sha256=dataset.tokenizer.sha256,
        data_sha256=dataset.sha256,
        seed=config.seed,
        version=importlib.metadata.version("kdjax"),
    )


def _framing(config: ConfigDict, experiment: Experiment) -> float:
    """Bytes per token that the files take beside what they hold."""
    examples, tokens = pipeline.length(experiment.dataset.train), experiment.dataset.context
    shards = -(-examples // config.cache.examples_per_shard)
    return (_RECORD * examples + _SHARD * shards) / (examples * tokens)


def _log_probs(experiment: Experiment) -> Callable[[Variables, Any], Array]:
    """What the teacher says at some places of a batch, drawn at random, all classes: [positions, classes]."""
    model, normalise = experiment.teachers[MAIN], experiment.task.make_normalise(experiment.dataset)

    def said(variables: Variables, batch: Any) -> Array:
        batch = normalise(batch)
        outputs = model.apply(variables, batch["inputs"], train=False)[0]
        places = jax.random.permutation(jax.random.key(0), outputs.hidden.shape[0] * outputs.hidden.shape[1])[:256]
        some = outputs.hidden.reshape(-1, outputs.hidden.shape[-1])[places]
        return jax.nn.log_softmax(logits_of(outputs._replace(hidden=some)), axis=-1)

    return jax.jit(said, out_shardings=sharding.replicated(experiment.mesh))


def _ask(experiment: Experiment, manifest: Manifest) -> Callable[[Variables, Any], dict[str, Array]]:
    """Jitted ``(variables, batch) -> signals`` [b, t, ...], logits made for a few tokens at a time."""
    model, normalise = experiment.teachers[MAIN], experiment.task.make_normalise(experiment.dataset)
    mesh, config = experiment.mesh, experiment.config

    def of_logits(logits: Array, ids: Array, places: Array) -> dict[str, Array]:
        if manifest.form == "top_k":
            kept, log_probs, log_rest = sparse.top_k(logits, manifest.width)
            log_sum = jax.nn.logsumexp(logits, axis=-1)
            return {"ids": kept, "log_probs": log_probs, "log_rest": log_rest, "log_sum": log_sum}
        # By example and place, so that what is drawn depends on neither the batch nor the chunks.
        key = jax.random.key(manifest.seed)
        key_of = lambda example, place: jax.random.fold_in(jax.random.fold_in(key, example), place)
        keys = jax.vmap(lambda example: jax.vmap(lambda place: key_of(example, place))(places))(ids)
        one = lambda key, logits: sparse.draw(key, logits, manifest.width)[:2]
        drawn, log_probs = jax.vmap(jax.vmap(one))(keys, logits)
        return {"ids": drawn, "log_probs": log_probs}

    def ask(variables: Variables, batch: Any) -> dict[str, Array]:
        ids = batch["id"]
        outputs = model.apply(variables, normalise(batch)["inputs"], train=False)[0]
        b, t, _ = outputs.hidden.shape
        count = chunks.chunk_count(b, t, experiment.classes, language.layout_of(mesh), config.train.tokens_per_chunk)
        size = t // count

        def chunk(number: Array) -> dict[str, Array]:
            hidden = jax.lax.dynamic_slice_in_dim(outputs.hidden, number * size, size, axis=1)
            logits = logits_of(outputs._replace(hidden=hidden))
            return of_logits(logits, ids, number * size + jnp.arange(size))

        found = jax.lax.map(chunk, jnp.arange(count))  # [chunks, b, tokens of a chunk, ...]
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(b, t, *x.shape[3:]), found)

    return jax.jit(ask, out_shardings=sharding.replicated(mesh))


def _write(
    experiment: Experiment, variables: Variables, folder: Path, manifest: Manifest, say: Callable[[str], None]
) -> None:
    """Writes the shards that are missing. All processes ask together, since the teacher may lie on all of them; each
    writes its share of the shards."""
    ask = _ask(experiment, manifest)
    shards = -(-manifest.examples // manifest.examples_per_shard)
    missing = np.zeros(shards, bool)
    missing[cache.missing_shards(folder, manifest)] = True
    missing = np.flatnonzero(multihost_utils.broadcast_one_to_all(missing))
    if 0 < len(missing) < shards:
        say(f"{folder}: going on, {len(missing)} of {shards} shards are missing.")

    encode = partial(signal_codec.encode_top_k, vocabulary=manifest.vocabulary)
    if manifest.form == "sample":
        encode = partial(signal_codec.encode_sample, samples=manifest.width, vocabulary=manifest.vocabulary)

    def records(number: int) -> Iterator[tuple[int, bytes]]:
        for ids, batch in _batches(experiment, [cache.shard_examples(manifest, number)]):
            found = jax.device_get(ask(variables, batch))
            for row, example in enumerate(ids):
                yield example, encode(**{name: value[row] for name, value in found.items()})

    for number in map(int, missing):
        if number % jax.process_count() == jax.process_index():
            cache.write_shard(folder, manifest, number, records(number))
        else:
            for _ in records(number):  # its part of what all processes compute together
                pass
        say(f"{folder}: shard {number + 1} of {shards}.")


def _batches(experiment: Experiment, blocks: list[range]) -> Iterator[tuple[list[int], dict[str, Array]]]:
    """``(ids, batch on the mesh)``; the last batch of a block is filled up with its first example."""
    split, size = experiment.dataset.train, _batch_size(experiment.config)
    share = pipeline.block_of(split, size, jax.process_index(), jax.process_count())
    for block in blocks:
        for begin in range(0, len(block), size):
            ids = list(block[begin : begin + size])
            filled = np.array(ids + ids[:1] * (size - len(ids)), np.int32)[share]
            batch = pipeline.gather(split, filled, np.zeros_like(filled))
            yield ids, sharding.put_batch(batch, experiment.mesh)


def _batch_size(config: ConfigDict) -> int:
    return config.cache.examples_per_batch or config.data.eval_batch_size


def _check_disk(manifest: Manifest, workdir: Path) -> None:
    per_token = 6 * manifest.width + 8 if manifest.form == "top_k" else 4 * manifest.width + 1
    needed = per_token * manifest.positions * manifest.examples
    free = shutil.disk_usage(workdir).free
    if needed > free:
        text = memory.bytes_text
        raise UserError(
            f"the cache in {workdir} may need {text(needed)} and the disk has {text(free)} left: lower cache.k or "
            "cache.samples, or choose another --workdir."
        )
