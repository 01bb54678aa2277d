"""Unstructured pruning while a model learns: the smallest weights become zero and stay it.

Zhu & Gupta 2017, "To prune, or not to prune: exploring the efficacy of pruning for model compression", equation 1: the
share of zeros at step t of pruning, between ``begin`` and ``end``, is s_f + (s_i - s_f) (1 - (t - begin) / (end -
begin))³, which is fast while much can be spared.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdjax.compress.weights import check_skip, is_stacked, weights_of
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Params, flatten_paths, path_name
from kdjax.state import LEARNED

SCOPES = ("layer", "global")


class SparseState(NamedTuple):
    """The state of :func:`sparsify`, all that it needs to go on.

    Attributes:
      step: int32 scalar, the number of updates done.
      masks: bool arrays by path of weight, true where a weight lives.
      inner: the inner optimiser's state.
    """

    step: Array
    masks: dict[str, Array]
    inner: Any


def sparsity_at(step: Any, *, final: float, initial: float = 0.0, begin: int, end: int) -> Array:
    """The share of zeros after the update of a step (from 0), float32; 0 before ``begin``."""
    done = jnp.clip((jnp.asarray(step, jnp.float32) - begin) / max(end - begin, 1), 0.0, 1.0)
    done = jnp.where(jnp.asarray(step) >= end, 1.0, done)
    return jnp.where(jnp.asarray(step) < begin, 0.0, final + (initial - final) * (1.0 - done) ** 3)


def sparsify(
    inner: optax.GradientTransformation,
    *,
    final: float,
    initial: float = 0.0,
    begin: int = 0,
    end: int,
    every: int = 1,
    scope: str = "layer",
    skip: Sequence[str] = (),
    params_example: Params,
) -> optax.GradientTransformationExtraArgs:
    """An optimiser whose updates set the smallest weights to exactly zero.

    At steps ``begin``, ``begin + every``, ... and at ``end`` the weights that are smallest in magnitude after the inner
    optimiser's update are masked, those masked before among them, so that a zero stays a zero; after ``end`` the masks
    are fixed. What the inner optimiser has in mind for a masked weight is dropped. Extra arguments, such as
    ``learning_rate``, are passed on. In a moving average of the parameters zeros come late: prune without one.

    Args:
      inner: the optimiser.
      final: the share of zeros from step ``end`` on; 0: the inner optimiser alone.
      initial: the share at step ``begin``.
      begin: the first step, from 0, that prunes.
      end: the last one.
      every: steps from one choice of masks to the next.
      scope: ``"layer"``: each array, and each layer of a decoder's stacked ones, has the share; ``"global"``: all
        together, by magnitude.
      skip: regexes, found anywhere in a path, of weights that are left whole.
      params_example: the student's parameters, or their shapes. Weights that they have not, such as the objective's,
        are left alone.

    Raises:
      UserError: a share outside [0, 1) or that falls; steps out of order; an unknown scope; a regex that is broken or
        matches no weight.
    """
    _check(final, initial, begin, end, every, scope)
    check_skip("skip of a pruning", skip, params_example)
    inner = optax.with_extra_args_support(inner)
    if not final:
        return inner
    names = [name for name in weights_of(params_example, skip) if not name.startswith(f"{LEARNED}/")]
    stacked = {name: is_stacked(name, params_example) for name in names}

    def init(params: Params) -> SparseState:
        leaves = flatten_paths(params)
        masks = {name: jnp.ones(leaves[name].shape, bool) for name in names}
        return SparseState(jnp.zeros((), jnp.int32), masks, inner.init(params))

    def chosen(weights: dict[str, Array], masks: dict[str, Array], step: Array) -> dict[str, Array]:
        share = sparsity_at(step, final=final, initial=initial, begin=begin, end=end)

        def largest(scores: Array) -> Array:
            """Of scores [n], whether each is among those that stay."""
            # Exact at the end, which float32 is not for the largest arrays.
            dropped = jnp.where(step >= end, round(final * scores.size), jnp.round(share * scores.size))
            stays = jnp.arange(scores.size) >= dropped.astype(jnp.int32)
            return jnp.zeros(scores.size, bool).at[jnp.argsort(scores)].set(stays)

        scores = {n: jnp.where(masks[n], jnp.abs(weights[n].astype(jnp.float32)), -1.0) for n in names}
        if scope == "layer":
            rows = {n: scores[n].reshape(scores[n].shape[0] if stacked[n] else 1, -1) for n in names}
            return {n: jax.lax.map(largest, rows[n]).reshape(scores[n].shape) for n in names}
        stays = largest(jnp.concatenate([scores[n].reshape(-1) for n in names]))
        parts = jnp.split(stays, np.cumsum([scores[n].size for n in names])[:-1])
        return {n: part.reshape(scores[n].shape) for n, part in zip(names, parts, strict=True)}

    def update(updates: Params, state: SparseState, params: Any = None, **extra: Any) -> tuple[Params, SparseState]:
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        step, moved = state.step, flatten_paths(optax.apply_updates(params, updates))
        due = (step >= begin) & (step <= end) & (((step - begin) % every == 0) | (step == end))
        weights = {name: moved[name] for name in names}
        masks = jax.lax.cond(due, chosen, lambda weights, masks, step: masks, weights, state.masks, step)

        def masked(path: Any, update: Array, param: Array) -> Array:
            mask = masks.get(path_name(path))
            return update if mask is None else jnp.where(mask, update, -param.astype(update.dtype))

        updates = jax.tree_util.tree_map_with_path(masked, updates, params)
        return updates, SparseState(step + 1, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def sparsity(params: Params, skip: Sequence[str] = ()) -> dict[str, Any]:
    """``{"share_of_zeros": float, "nonzero": int}``: of the weights that no regex of ``skip`` finds; of all."""
    weights = weights_of(params, skip)
    zeros = sum(int(leaf.size - jnp.count_nonzero(leaf)) for leaf in weights.values())
    nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(params))
    return {"share_of_zeros": zeros / max(sum(leaf.size for leaf in weights.values()), 1), "nonzero": nonzero}


def _check(final: float, initial: float, begin: int, end: int, every: int, scope: str) -> None:
    if not 0 <= initial <= final < 1:
        raise UserError(f"sparsity cannot go from {initial} to {final}: give shares from 0 to below 1, not falling.")
    if not 0 <= begin <= end:
        raise UserError(f"pruning cannot begin at step {begin} and end at step {end}: give steps from 0, in order.")
    if every < 1:
        raise UserError(f"pruning cannot choose its masks every {every} steps: give 1 or more.")
    if scope not in SCOPES:
        raise unknown("scope of pruning", scope, SCOPES)
