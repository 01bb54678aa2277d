"""Checkpoints: the only module that imports orbax.

A checkpoint holds three items: ``model`` (what is evaluated and handed over: params and state), ``train`` (the rest of
the state) and ``meta`` (JSON: position, fingerprints, versions, and a checksum of every array, because Orbax restores
a flipped bit without a word). The teacher is never in it.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from kdjax.errors import UserError
from kdjax.model import Variables, first_mismatch, flatten_paths
from kdjax.state import TrainState, inference_variables

# Orbax reports each of its steps, and failures with their traceback; what matters to the user is raised by us.
logging.getLogger("absl").setLevel(logging.CRITICAL)


class Checkpoints:
    """The checkpoints of one arm, written in the background. A context manager, since a save may be in flight."""

    def __init__(self, folder: Path, keep: int = 2, keep_best: bool = True):
        self.folder = Path(folder).absolute()
        kept = [policies.LatestN(max(keep, 1))]
        if keep_best:
            kept.append(policies.BestN(get_metric_fn=lambda metrics: metrics["eval_accuracy"], n=1))
        options = ocp.CheckpointManagerOptions(
            # Both the newest and the best: a best-only policy deletes the newest one, and a resume goes back.
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
            create=True,
        )
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.folder}: {error.strerror or error}.") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        with _as_user_error(self.folder):
            self._manager.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any], eval_accuracy: float | None) -> None:
        """Starts saving; returns once the arrays are copied, so that the state may be donated."""
        model, train = _items(state)
        digests = jax.device_get(_checksums({"model": model, "train": train}))
        meta = {**meta, "step": step, "checksums": {path: int(value) for path, value in flatten_paths(digests).items()}}
        metrics = None if eval_accuracy is None else {"eval_accuracy": eval_accuracy}
        with _as_user_error(self.folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(model), train=ocp.args.StandardSave(train), meta=ocp.args.JsonSave(meta)
                ),
                metrics=metrics,
            )

    def latest_step(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        with _as_user_error(self.folder):
            self._manager.wait_until_finished()

    def restore_newest(self, like: TrainState, say: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest undamaged checkpoint, onto the shardings of ``like`` (shapes will do); ``None`` if there is none.

        A damaged checkpoint is set aside (renamed, not deleted), and ``say`` is told.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                return self._restore(step, like)
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                aside = self.folder / f"damaged-{step}"
                (self.folder / str(step)).rename(aside)
                self._manager.reload()
                reason = str(error).split("\n")[0][:160]
                say(
                    f"checkpoint {self.folder / str(step)} is damaged ({reason}): set aside as {aside.name}, "
                    "falling back to the one before it."
                )
        return None

    def _restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        model, train = _items(like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardRestore(model),
                train=ocp.args.StandardRestore(train),
                meta=ocp.args.JsonRestore(),
            ),
        )
        _verify({"model": restored["model"], "train": restored["train"]}, restored["meta"]["checksums"])
        return _state(restored["model"], restored["train"]), restored["meta"]


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
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            args = ocp.args.Composite(model=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
            restored = reader.restore(path, args=args)
        _verify({"model": restored["model"]}, restored["meta"]["checksums"])
    except Exception as error:
        raise UserError(f"checkpoint {path} is truncated or damaged: {str(error).splitlines()[0][:160]}.") from error
    return restored["model"], restored["meta"]


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


@jax.jit
def _checksums(tree: Any) -> Any:
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


def _verify(tree: Any, checksums: dict[str, int]) -> None:
    found = flatten_paths(jax.device_get(_checksums(tree)))
    for path, value in found.items():
        if int(value) != checksums.get(path):
            raise ValueError(f"the checksum of {path} differs")


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
    import hashlib

    sha = hashlib.sha256()
    for path, leaf in flatten_paths(variables).items():
        array = np.asarray(jax.device_get(leaf))
        sha.update(f"{path} {array.dtype} {array.shape}\n".encode())
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()
