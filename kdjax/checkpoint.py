"""Checkpoints: the only module that imports orbax.

A checkpoint holds three items: ``model`` (what is evaluated and handed over: params and state), ``train`` (the rest of
the state) and ``meta`` (JSON: position, fingerprints, versions, and a checksum of every array, because Orbax restores
a flipped bit without a word). The teacher is never in it.
"""

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from kdjax import cluster, memory, sharding
from kdjax.errors import UserError, first_line
from kdjax.model import Variables, first_mismatch, flatten_paths
from kdjax.state import TrainState, inference_variables
from kdjax.untrusted import parse_json

# Orbax reports each of its steps, and failures with their traceback; what matters to the user is raised by us.
logging.getLogger("absl").setLevel(logging.CRITICAL)


# Orbax measures its time limits with the machine's clock, whose jump would fail a save. A save that hangs is the
# watchdog's to notice.
_NEVER_S = 10**9
_MOST_OF_A_DEVICE = 0.95  # that may be full with a copy of the state: the rest is for what lies between arrays


class Checkpoints:
    """The checkpoints of one arm, written in the background. A context manager, since a save may be in flight."""

    def __init__(self, folder: Path, keep: int = 2, keep_best: bool = True):
        self.folder = Path(folder).absolute()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        kept = [policies.LatestN(max(keep, 1))]
        if keep_best:
            kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["eval_accuracy"], n=1))
        options = ocp.CheckpointManagerOptions(
            # Both the newest and the best: a best-only policy deletes the newest one, and a resume goes back.
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            create=True,
            async_options=ocp.AsyncOptions(timeout_secs=_NEVER_S, create_directories_asynchronously=False),
        )
        try:
            self._set_aside = cluster.by_first(lambda: _set_aside_unreadable(self.folder)) or []
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.folder}: {error.strerror or error}.") from error
        except (ValueError, TypeError, KeyError) as error:  # Orbax reads what it wrote beside each checkpoint
            raise UserError(
                f"the checkpoints in {self.folder} cannot be read ({error}): move the damaged one out of that folder."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            with _as_user_error(self.folder):
                self._manager.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any], eval_accuracy: float | None) -> None:
        """Starts saving; returns once the state is copied or its copy is under way, so that it may be donated.

        One process copies on its devices, where these have room for it, and all else is done in the background, also
        Orbax's own copy to the host. A save that fails says so at the next call. Several processes keep in step, so
        each waits for the checksums and for that copy.
        """
        self._settle()
        model, train = _items(state)
        items = {"model": model, "train": train}
        in_background = jax.process_count() == 1 and _has_room(items)
        if in_background:
            items = _copied(items)
        checksums = _begin_checksums(items)

        def write() -> None:
            whole = {**meta, "step": step, "checksums": _said(checksums)}
            arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            metrics = None if eval_accuracy is None else {"eval_accuracy": eval_accuracy}
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(whole)), metrics=metrics)

        if in_background:
            self._writing = self._writer.submit(write)
        else:
            with _as_user_error(self.folder):
                write()

    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        self._settle()
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._settle()
        with _as_user_error(self.folder):
            self._manager.wait_until_finished()

    def _settle(self) -> None:
        """Until the manager has what it was last given: no two threads may call it at once."""
        writing, self._writing = self._writing, None
        if writing:
            with _as_user_error(self.folder):
                writing.result()

    def restore_newest(self, like: TrainState, say: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged checkpoint, onto the shardings of ``like`` (shapes will do); ``None`` if there is none.

        A damaged checkpoint is set aside (renamed, not deleted), and ``say`` is told.
        """
        model, train = _items(like)
        for sentence in self._set_aside:
            say(sentence)
        wanted = {"model": ocp.args.StandardRestore(model), "train": ocp.args.StandardRestore(train)}
        for step in sorted(self._manager.all_steps(), reverse=True):
            place = self.folder / str(step)
            try:
                restored = _read(place, wanted)
            except _Damaged as error:
                aside = place.with_name(f"damaged-{step}")
                cluster.by_first(functools.partial(place.rename, aside))
                self._manager.reload()
                say(
                    f"checkpoint {place} is damaged ({error}): set aside as {aside.name}, falling back to the one "
                    "before it."
                )
                continue
            return _state(restored["model"], restored["train"]), restored["meta"]
        return None


def load_model(folder: Path, like: Variables) -> tuple[Variables, dict[str, Any]]:
    """The deliverable of the newest checkpoint in a folder: ``(variables, meta)``, onto the shardings of ``like``.

    Raises:
      UserError: no checkpoint there, one of another architecture (names the first parameter that differs), or a
        damaged one.
    """
    folder = Path(folder).absolute()
    steps = (
        sorted((int(child.name) for child in folder.iterdir() if child.name.isdigit()), reverse=True)
        if folder.is_dir()
        else []
    )
    if not steps:
        raise UserError(f"no checkpoint in {folder}: name a workdir of kdjax, or one of its checkpoints/ARM folders.")
    path = folder / str(steps[0])
    try:
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            found = reader.metadata(path / "model").item_metadata.tree
    except Exception as error:
        raise UserError(f"checkpoint {path} is truncated or damaged: its metadata cannot be read.") from error
    difference = first_mismatch(like, found)
    if difference:
        raise UserError(f"checkpoint {path} is of another architecture: {difference}.")
    try:
        restored = _read(path, {"model": ocp.args.StandardRestore(like)})
    except _Damaged as error:
        raise UserError(f"checkpoint {path} is truncated or damaged: {error}.") from error
    return restored["model"], restored["meta"]


def _set_aside_unreadable(folder: Path) -> list[str]:
    """Renames checkpoints whose description is no JSON object, on which Orbax would fail for all; says which."""
    found = []
    for path in folder.glob("[0-9]*/_CHECKPOINT_METADATA"):
        try:
            damaged = not isinstance(parse_json(path.read_bytes()), dict)
        except ValueError:
            damaged = True
        if damaged:
            aside = path.parent.rename(path.parent.with_name(f"damaged-{path.parent.name}"))
            found.append(
                f"checkpoint {path.parent} is damaged (its description is unreadable): set aside as {aside.name}."
            )
    return found


class _Damaged(Exception):
    """A checkpoint is not what was saved; the message is a phrase that says how this shows."""


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The items of a checkpoint by name, with ``meta``, verified; every process reads the parts that it holds.

    Raises:
      _Damaged: in every process, where any of them cannot read its part, or a checksum differs.
    """
    me, reason, restored = jax.process_index(), "", {}
    # Without Orbax's barriers: a process whose part is damaged never comes to them, and the others would wait.
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"p{me}")
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone) as reader:
            args = ocp.args.Composite(**wanted, meta=ocp.args.JsonRestore())
            restored = dict(reader.restore(path, args=args).items())
        if not isinstance(restored["meta"], dict) or not isinstance(restored["meta"].get("checksums"), dict):
            reason = "its meta has no checksums"
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        reason = first_line(error)[:160]
    if not cluster.all_agree(not reason):
        raise _Damaged(reason or "another process cannot read its part")
    checksums = restored["meta"]["checksums"]
    for name, value in _digests({item: restored[item] for item in wanted}).items():
        if value != checksums.get(name):
            raise _Damaged(f"the checksum of {name} differs")
    return restored


def _items(state: TrainState) -> tuple[Variables, dict[str, Any]]:
    train = {"step": state.step, "opt_state": state.opt_state, "key": state.key, "view_key": state.view_key}
    if jax.tree.leaves(state.learned):
        train["learned"] = state.learned
    if state.ema:
        train["params"] = state.params
    return inference_variables(state), train


def _state(model: Variables, train: dict[str, Any]) -> TrainState:
    # With a moving average, that is the model, and the raw parameters are kept beside it.
    params, ema = (train["params"], model["params"]) if "params" in train else (model["params"], {})
    return TrainState(
        step=train["step"],
        params=params,
        model_state=model["state"],
        learned=train.get("learned", {"params": {}, "state": {}}),
        opt_state=train["opt_state"],
        key=train["key"],
        view_key=train["view_key"],
        ema=ema,
    )


def _digests(tree: Any) -> dict[str, int]:
    """The checksum of each array by its path, the same in every process."""
    return _said(_begin_checksums(tree))


def _begin_checksums(tree: Any) -> dict[str, jax.Array]:
    """The same, on the devices, which may still be at it."""
    flat = flatten_paths(tree)
    on_meshes = [x.sharding for x in flat.values() if isinstance(x.sharding, jax.sharding.NamedSharding)]
    # On every device, since no process can read what lies with others alone.
    everywhere = jax.sharding.NamedSharding(on_meshes[0].mesh, jax.P()) if on_meshes else None
    return _checksums(everywhere)(flat)


def _said(checksums: dict[str, jax.Array]) -> dict[str, int]:
    return {path: int(x) for path, x in jax.device_get(checksums).items()}


def _has_room(tree: Any) -> bool:
    """Whether the devices can hold a copy of a tree besides all that they had to hold at once so far; the host of a CPU
    always can."""
    stats = _stats(tree)
    if not {"bytes_limit", "peak_bytes_in_use"} <= stats.keys():
        return True
    return stats["peak_bytes_in_use"] + memory.per_device(tree) < _MOST_OF_A_DEVICE * stats["bytes_limit"]


def _stats(tree: Any) -> dict[str, int]:
    return next(iter(jax.tree.leaves(tree)[0].devices())).memory_stats() or {}


def _copied(tree: Any) -> Any:
    """A copy of each array where it lies, under way: what is donated after it is overwritten after it."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, _copies(tuple(x.sharding for x in leaves))(leaves))


@functools.cache
def _copies(shardings: tuple[Any, ...]) -> Callable[[Any], Any]:
    return jax.jit(lambda leaves: [jnp.copy(x) for x in leaves], out_shardings=list(shardings))


@functools.cache
def _checksums(out_shardings: Any) -> Callable[[Any], Any]:
    return jax.jit(_checksum_each, out_shardings=out_shardings)


def _checksum_each(tree: Any) -> Any:
    """A 32-bit checksum of each array, computed where it lies, so that it does not depend on the sharding.

    Each word is multiplied by an odd number that depends on its place: a flipped bit always changes the sum, and other
    damage escapes with a chance of about 2^-32.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.dtype == jnp.bool_:
            leaf = leaf.astype(jnp.uint8)
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(leaf, word).astype(jnp.uint32)
        place = jnp.zeros(words.shape, jnp.uint32)
        for axis in range(words.ndim):
            place = place * words.shape[axis] + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        return jnp.sum(words * (place * jnp.uint32(2654435762) + jnp.uint32(1)), dtype=jnp.uint32)

    return jax.tree.map(checksum, tree)


@contextlib.contextmanager
def _as_user_error(folder: Path) -> Iterator[None]:
    """Says in one sentence that a disk is full or read-only. Earlier saves are whole: each is renamed into place."""
    try:
        yield
    except Exception as error:
        # A full disk shows as an OSError, or as whatever tensorstore's many lines are raised as.
        is_full = any(mark in str(error) for mark in ("RESOURCE_EXHAUSTED", "No space left"))
        if not is_full and not isinstance(error, OSError):
            raise
        reason = "no space left on the disk" if is_full else str(error)
        raise UserError(
            f"cannot write checkpoints in {folder}: {reason}; those saved before are kept, so free some space and run "
            "the same command again."
        ) from error


def digest(variables: Variables) -> str:
    """SHA-256 over the path, dtype, shape and bytes of every array: the fingerprint of a model's weights."""
    sha = hashlib.sha256()
    for path, leaf in flatten_paths(variables).items():
        array = np.asarray(sharding.to_host(leaf))
        sha.update(f"{path} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
