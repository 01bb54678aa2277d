"""Causal language modelling: windows of tokens, decoders by their sizes or from a Hugging Face folder, scores."""

import dataclasses
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import chunks, huggingface, objective, sharding
from kdjax.chunks import Layout, Positions
from kdjax.compress import decoders
from kdjax.data import cache, pipeline, text, tokenizers
from kdjax.data.packing import TextSplit
from kdjax.data.text import TextDataset
from kdjax.errors import UserError, unknown
from kdjax.model import Array, Model, Outputs, Signal, Variables, logits_of
from kdjax.models.decoder import DecoderConfig, RopeScaling, make_decoder
from kdjax.objective import Batch

FROM_TEACHER = "teacher"  # as student.init: the student begins as a part of its teacher
NO_WEIGHTS: Variables = {"params": {}, "state": {}}
_RUNTIME = ("remat", "attention")  # options that say how a decoder is computed, not what it is
_CALIBRATION = 16  # windows by which a teacher's channels are ranked, where a student takes some of them over
_SIGNAL = "signal_"  # what the names of a cached signal's arrays begin with in a batch


# ------------------------------------------------------------------------------------------------- data and models


def load(config: ConfigDict, dataset: TextDataset | None = None) -> TextDataset:
    """The text of a config, or the one that is given, in windows; and what cannot go with text, refused."""
    if config.data.curriculum.pacing != "none":
        raise UserError("data.curriculum is for classification: set data.curriculum.pacing to none.")
    if config.data.labels != 1.0 or config.teacher.labels != 1.0 or config.data.omit_class != -1:
        raise UserError("data.labels, teacher.labels and data.omit_class are for classification: leave them out.")
    if config.peers:
        raise UserError("peers are for classification: leave them out for a language model.")
    if config.teacher.combine == "routed":
        raise UserError('teacher.combine="routed" is for classification: combine the teachers otherwise.')
    place = config.student.init
    if place and place != FROM_TEACHER and not is_folder(place):
        raise UserError(
            f"student.init={place} is no model in the layout of Hugging Face, with a config.json: give the folder of "
            "one, or teacher, or nothing."
        )
    return dataset or text.load(config.data)


def teacher_view(dataset: TextDataset, config: ConfigDict) -> TextDataset:
    """The data as the teacher sees it: all of it."""
    return dataset


def student_view(dataset: TextDataset, config: ConfigDict) -> TextSplit:
    """The training split as the student sees it: all of it."""
    return dataset.train


def has_labels(split: TextSplit) -> bool:
    """Whether any token is a target; the next token always is its own label."""
    return True


def classes(config: ConfigDict, dataset: TextDataset) -> int:
    """The vocabulary that models and data share.

    A model from a folder is cut to the ids of its tokenizer, for tables of embeddings are padded; every tokenizer must
    give the same ids, or one's a prefix of the other's, to which all are then cut.

    Raises:
      UserError: tokenizers that differ (names the first difference), a folder without one, or data with ids beyond what
        is shared.
    """
    shared = dataset.tokenizer.size
    for where, part in _parts(config).items():
        if not is_folder(part.init):
            continue
        if not (Path(part.init) / "tokenizer.json").is_file():
            raise UserError(
                f"{where}.init={part.init} has no tokenizer.json to compare with data.tokenizer="
                f"{config.data.tokenizer}, and other ids would be noise to it: copy its tokenizer there."
            )
        try:
            shared = min(shared, tokenizers.shared_vocabulary(tokenizers.load(part.init), dataset.tokenizer))
        except UserError as error:
            raise UserError(f"{where}.init={part.init} and data.tokenizer={config.data.tokenizer}: {error}") from error
    highest = max(int(split.tokens.max()) for split in (dataset.train, dataset.test))
    if highest >= shared:
        raise UserError(
            f"the data has the token {highest} and teacher and student share {shared} tokens: use a tokenizer that "
            "both know, or text without that token."
        )
    return shared


def _parts(config: ConfigDict) -> dict[str, ConfigDict]:
    named = {f"more_teachers.{name}": ConfigDict({"init": "", **part}) for name, part in config.more_teachers.items()}
    return {"teacher": config.teacher, **named, "student": config.student}


def make_model(config: ConfigDict, part: ConfigDict, dataset: TextDataset, shared: int) -> Model:
    """The decoder of a part of the config, whose logits are those of the shared vocabulary (``classes``)."""
    sizes = decoder_config(config, part, dataset)
    if sizes.vocabulary < shared:
        raise UserError(
            f"a decoder of {sizes.vocabulary} tokens cannot speak the {shared} of the tokenizer: set its option "
            "vocabulary to at least that, or leave it out."
        )
    if part.get("init", "") == FROM_TEACHER:
        _try_part(decoder_config(config, config.teacher, dataset), sizes)
    runtime = {name: value for name, value in part.options.items() if name in _RUNTIME}
    return _cut(make_decoder(sizes, dtype=jnp.dtype(config.train.dtype), **runtime), shared)


def _cut(model: Model, count: int) -> Model:
    """The model without logits for the rows that only pad its head."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        outputs, state = model.apply(*args, **kwargs)
        assert outputs.head is not None, "a decoder returns its head"
        return outputs._replace(head=dataclasses.replace(outputs.head, classes=count)), state

    return model._replace(apply=apply)


def decoder_config(config: ConfigDict, part: ConfigDict, dataset: TextDataset) -> DecoderConfig:
    """The sizes of a decoder: from its folder, from its teacher but for what its options say, or from its options.

    Raises:
      UserError: an unknown model or option, options beside a folder, or a context shorter than the data's windows.
    """
    if part.name != "decoder":
        raise unknown("language model", part.name, ["decoder"])
    options = {name: value for name, value in part.options.to_dict().items() if name not in _RUNTIME}
    for option in options:
        if option not in DecoderConfig._fields:
            raise unknown("option of a decoder", option, (*DecoderConfig._fields, *_RUNTIME))
    if isinstance(options.get("rope_scaling"), Mapping):
        try:
            options["rope_scaling"] = RopeScaling(**options["rope_scaling"])
        except TypeError as error:
            raise UserError(f"a decoder's rope_scaling takes {', '.join(RopeScaling._fields)}: {error}.") from error
    init = part.get("init", "")
    if is_folder(init):
        found = huggingface.read_config(init)
        for option, value in options.items():
            if value != getattr(found, option):
                raise UserError(
                    f"{init} has {option}={getattr(found, option)} and the config says {value}: leave out that option, "
                    "or give the folder that it means."
                )
    elif init == FROM_TEACHER:
        if config.teacher.init == FROM_TEACHER:
            raise UserError("teacher.init=teacher names no weights: give a folder, or nothing.")
        found = decoder_config(config, config.teacher, dataset)._replace(**options)
    else:
        found = _from_options(options, dataset)
    if found.context < dataset.context:
        raise UserError(
            f"data.context={dataset.context} is longer than the {found.context} tokens that the decoder's positions "
            "reach: shorten data.context."
        )
    return found


def _try_part(whole: DecoderConfig, part: DecoderConfig) -> None:
    """Shapes a student as a part of its teacher, so that one that is none is refused before the teacher is trained."""
    sizes = ((whole.width,), (whole.layers, whole.kv_heads), (whole.layers, whole.mlp_width))
    ranked = decoders.Importance(*map(jnp.zeros, sizes))
    cut = lambda key: decoders.student_from_teacher(whole, make_decoder(whole).init(key), part, importance=ranked)
    jax.eval_shape(cut, jax.random.key(0))


def _from_options(options: Mapping[str, Any], dataset: TextDataset) -> DecoderConfig:
    width, heads = options.get("width", 128), options.get("heads", 4)
    defaults = {
        "vocabulary": dataset.tokenizer.size,
        "width": width,
        "layers": 2,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": max(width // heads, 1),
        "mlp_width": 4 * width,
        "context": dataset.context,
    }
    return DecoderConfig(**{**defaults, **options})


def heads(config: ConfigDict, part: ConfigDict, dataset: TextDataset) -> int:
    """How many attention heads the decoder of a part of the config has."""
    return decoder_config(config, part, dataset).heads


def is_folder(place: str) -> bool:
    """Whether a place is a model in the layout of Hugging Face."""
    return bool(place) and (Path(place) / "config.json").is_file() and not (Path(place) / "checkpoints").is_dir()


def load_weights(folder: str, mesh: Mesh, rules: sharding.Rules, dtype: Any) -> Variables:
    """The weights of a Hugging Face folder, tensor by tensor onto the mesh."""
    sizes = huggingface.read_config(folder)
    shapes = jax.eval_shape(make_decoder(sizes).init, jax.random.key(0))["params"]
    return huggingface.load(folder, sizes, shardings=sharding.by_rules(shapes, mesh, rules), dtype=dtype)


def first_weights(config: ConfigDict, dataset: TextDataset, mesh: Mesh, teacher: Callable[[], Variables]) -> Variables:
    """The weights with which both students begin, which ``student.init`` names; ``teacher`` gives its own."""
    place = config.student.init
    if place != FROM_TEACHER:
        return load_weights(place, mesh, config.sharding.student, jnp.float32)
    whole, part = (decoder_config(config, one, dataset) for one in (config.teacher, config.student))
    weights = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), teacher())
    ranked = None
    if whole._replace(layers=part.layers) != part:  # narrower, not only shallower
        some: dict[str, Any] = {"tokens": dataset.train.tokens, "segments": dataset.train.segments}
        some = {name: jnp.asarray(array[:_CALIBRATION, :-1], jnp.int32) for name, array in some.items()}
        ranked = decoders.importance(whole, weights, some)
    return decoders.student_from_teacher(whole, weights, part, importance=ranked)


# ------------------------------------------------------------------------------------------------------- a batch


def inputs(dataset: TextDataset, batch_size: int) -> Any:
    """The shapes of a batch of what a decoder takes."""
    window = jax.ShapeDtypeStruct((batch_size, dataset.context), jnp.int32)
    return {"tokens": window, "segments": window, "positions": window}


def setting(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What the objective must know besides (``objective.Setting``)."""
    return {"sequences": True, "tokens_per_chunk": config.train.tokens_per_chunk, "layout": layout_of(mesh)}


def layout_of(mesh: Mesh) -> Layout | None:
    """How the positions of a batch lie on the mesh; ``None`` for one device."""
    return Layout(mesh, sharding.batch_axes(mesh)) if mesh.size > 1 else None


def make_preprocess(dataset: TextDataset, augment: Mapping[str, Any]) -> Callable[[Batch, Array], Batch]:
    """``preprocess(batch, key) -> batch``; text is not augmented."""
    normalise = make_normalise(dataset)
    return lambda batch, key: normalise(batch)


def make_normalise(dataset: TextDataset) -> Callable[[Batch], dict[str, Any]]:
    """``normalise(batch) -> batch``: from windows of ``context + 1`` tokens to inputs, labels and mask [b, context].

    The label of a position is the token after it, where that is of the same document and in the loss; -1 elsewhere.
    This is the only place where targets are shifted, and nothing is left out by the value of a token.
    """

    def normalise(batch: Batch) -> dict[str, Any]:
        tokens, segments = batch["tokens"].astype(jnp.int32), batch["segments"].astype(jnp.int32)
        goes_on = (segments[:, 1:] == segments[:, :-1]) & (segments[:, :-1] > 0)
        wanted = goes_on & batch["in_loss"][:, 1:].astype(bool)
        if "mask" in batch:  # of whole windows, the padding of a last batch
            wanted &= batch["mask"][:, None] > 0
        given = {"tokens": tokens[:, :-1], "segments": segments[:, :-1], "positions": positions_of(segments[:, :-1])}
        signal = {name.removeprefix(_SIGNAL): x for name, x in batch.items() if name.startswith(_SIGNAL)}
        return {
            "inputs": given | ({"signal": signal} if signal else {}),
            "labels": jnp.where(wanted, tokens[:, 1:], -1),
            "mask": wanted.astype(jnp.float32),
            "segments": given["segments"],
            "bytes": batch["bytes"][:, 1:].astype(jnp.int32),
            "id": batch["id"],
            "epoch": batch["epoch"],
        }

    return normalise


def positions_of(segments: Array) -> Array:
    """Positions [b, t], counted from 0 in each segment of ``segments`` [b, t]."""
    places = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    begins = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)


def padded(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two batches that differ in padding alone, made of a normalised one whose windows begin with padding: a quarter,
    since padding that ends a window would be out of causal attention's sight. Beside it, the same with other content in
    the padding and as many masked windows."""
    inputs, labels = batch["inputs"], batch["labels"]
    outside = jnp.broadcast_to(jnp.arange(labels.shape[1]) < labels.shape[1] // 4, labels.shape)
    segments = jnp.where(outside, 0, inputs["segments"])
    inputs = {**inputs, "segments": segments, "positions": positions_of(segments)}
    common = {**batch, "inputs": inputs, "segments": segments, "mask": jnp.where(outside, 0.0, batch["mask"])}
    tokens = inputs["tokens"]
    other = {**common, "inputs": {**inputs, "tokens": jnp.where(outside, jnp.roll(tokens, 1), tokens)}}
    masked = {**common, "inputs": {**inputs, "tokens": tokens[:, ::-1]}, "labels": jnp.roll(labels, 1)}
    masked["mask"] = jnp.zeros_like(batch["mask"])
    plain = {**common, "inputs": {**inputs, "tokens": jnp.where(outside, 0, tokens)}}
    plain["labels"] = jnp.where(outside, -1, labels)
    return plain, jax.tree.map(lambda x, y: jnp.concatenate([x, y]), other, masked)


# ------------------------------------------------------------------------------------------------- cached signals


def _said(variables: Variables, inputs: Any, **_: Any) -> tuple[Outputs, Any]:
    return Outputs(signal=Signal(**inputs["signal"])), {}


SIGNALLED = Model(init=lambda key: NO_WEIGHTS, apply=_said)  # a teacher that was asked before: it reads its answer


def with_signals(batches: Iterator[Mapping[str, Any]], found: cache.Cache) -> Iterator[dict[str, Any]]:
    """The batches with what the teacher said of each of their windows."""
    for batch in batches:
        signal = cache.read(found, batch["id"])
        yield {**batch, **{_SIGNAL + name: value for name, value in signal.items()}}


def check_cache(found: cache.Cache, dataset: TextDataset, teacher_sha256: str | None = None) -> None:
    """Refuses a cache of other data, of another tokenizer or, where it is known, of another teacher."""
    cache.check_matches(
        found.manifest,
        teacher_sha256=teacher_sha256 or found.manifest.teacher_sha256,
        tokenizer_sha256=dataset.tokenizer.sha256,
        data_sha256=dataset.sha256,
        examples=pipeline.length(dataset.train),
        positions=dataset.context,
    )


# --------------------------------------------------------------------------------------------------------- scores


def make_evaluate(
    model: Model | None,
    dataset: TextDataset,
    mesh: Mesh,
    batch_size: int,
    *,
    teachers: Mapping[str, Model] | None = None,
    weights: Mapping[str, float] | None = None,
    combine: str = "probabilities",
    tokens_per_chunk: int = 0,
) -> Callable[..., dict[str, float]]:
    """Makes ``evaluate(variables, teacher_variables={}, split=None) -> scores`` of a split, the test split by default.

    ``nll`` (nats per target token), ``perplexity`` (e to that), ``bits_per_byte`` (the bits of all targets over the
    UTF-8 bytes that they cover), ``accuracy`` (the share of targets that are the model's first choice), ``tokens`` and
    ``bytes`` (how many targets there are); with teachers also ``agreement`` (the share of targets at which both have
    the same first choice) and ``kl`` (KL(teachers || model) in nats per target).

    Without a ``model`` the scores are those of what the teachers say together.
    """
    teachers, normalise = teachers or {}, make_normalise(dataset)
    layout = layout_of(mesh)

    def sums_of(positions: Positions, shared: Any) -> dict[str, Array]:
        labels, mask = positions.batch["labels"], positions.batch["mask"]
        log_t = None
        if positions.teachers:
            said = [logits_of(outputs) for outputs in positions.teachers]
            how = "logits" if combine == "logits" else "probabilities"
            shares = [1.0] if weights is None else list(weights.values())
            logits = said[0] if len(said) == 1 else objective.combine_teachers(said, shares, how)
            log_t = jax.nn.log_softmax(logits, axis=-1)
        log_p = log_t if model is None else jax.nn.log_softmax(logits_of(positions.student), axis=-1)
        assert log_p is not None, "a model is scored, or else teachers"
        first = jnp.argmax(log_p, axis=-1)
        of_label = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        found = {"nll": -of_label, "accuracy": first == labels}
        if log_t is not None:
            found["kl"] = jnp.sum(jnp.exp(log_t) * (log_t - log_p), axis=-1)
            found["agreement"] = first == jnp.argmax(log_t, axis=-1)
        return {name: jnp.sum(jnp.where(mask > 0, value, 0.0)) for name, value in found.items()}

    def of_batch(variables: Variables, teacher_variables: Mapping[str, Variables], batch: Batch) -> dict[str, Array]:
        batch = normalise(batch)
        said = lambda one, weights: one.apply(weights, batch["inputs"], train=False)[0]
        taught = tuple(said(teachers[name], teacher_variables[name]) for name in teachers)
        student = taught[0] if model is None else said(model, variables)
        positions = Positions(student, taught, None, {name: batch[name] for name in ("labels", "mask")})
        b, t = batch["labels"].shape
        count = chunks.chunk_count(b, t, student.head.size, layout, tokens_per_chunk)
        _, sums = chunks.weighted_sums(sums_of, {}, positions, {}, count, layout)
        counted = {"tokens": jnp.sum(batch["mask"]), "bytes": jnp.sum(batch["mask"] * batch["bytes"])}
        return sums | counted

    jitted = jax.jit(of_batch, out_shardings=sharding.replicated(mesh))

    def evaluate(
        variables: Variables, teacher_variables: Mapping[str, Variables] | None = None, split: TextSplit | None = None
    ) -> dict[str, float]:
        totals: dict[str, float] = {}
        for batch in pipeline.eval_batches(
            dataset.test if split is None else split,
            batch_size=batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ):
            found = jax.device_get(jitted(variables, teacher_variables or {}, sharding.put_batch(batch, mesh)))
            totals = {name: totals.get(name, 0.0) + float(value) for name, value in found.items()}
        tokens, size = totals.pop("tokens"), totals.pop("bytes")
        means = {name: value / max(tokens, 1.0) for name, value in totals.items()}
        return {
            **means,
            "perplexity": math.exp(min(means["nll"], 700.0)),
            "bits_per_byte": totals["nll"] / math.log(2.0) / max(size, 1.0),
            "tokens": tokens,
            "bytes": size,
        }

    return evaluate


def make_accuracy(model: Model, dataset: TextDataset, mesh: Mesh, batch_size: int) -> Callable[[Variables], float]:
    """Makes ``accuracy(variables)``: how often the next token of the test split is the model's first choice."""
    evaluate = make_evaluate(model, dataset, mesh, batch_size)
    return lambda variables: evaluate(variables)["accuracy"]


def sample(
    model: Model, variables: Variables, dataset: TextDataset, *, new_tokens: int, temperature: float, seed: int = 0
) -> str:
    """What the model writes after the data set's prompt."""
    from kdjax.models.generate import generate

    ids, _ = dataset.tokenizer.encode(dataset.prompt)
    ids = ids if dataset.tokenizer.bos is None else np.r_[dataset.tokenizer.bos, ids]
    room = max(dataset.context - new_tokens, 1)
    prompt = np.asarray(ids[-room:], np.int32)[None]
    written = generate(
        model,
        variables,
        prompt,
        new_tokens=min(new_tokens, dataset.context - prompt.shape[1]),
        temperature=temperature,
        key=jax.random.key(seed),
        stop=dataset.tokenizer.eos,
    )
    return dataset.tokenizer.decode(np.asarray(sharding.to_host(written))[0, prompt.shape[1] :].tolist())


# ----------------------------------------------------------------------------------------------------- handing over


def hand_over(config: ConfigDict, dataset: TextDataset, variables: Variables, folder: Path) -> None:
    """Writes a student as a folder that ``transformers`` loads as it is: weights, config, tokenizer, generation."""
    sizes = decoder_config(config, config.student, dataset)
    tokenizer = dataset.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        place = config.data.tokenizer
        if place == "bytes":
            tokenizers.write_byte_tokenizer(scratch)
            place = scratch
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier scoring of the same run
        huggingface.save(
            folder, variables, sizes, tokenizer_folder=tokenizers.folder_of(place), eos=tokenizer.eos, bos=tokenizer.bos
        )


def describe_cache(found: cache.Cache) -> dict[str, Any]:
    """What kind of signals a cache holds and how large it is, for the results."""
    what = "k" if found.manifest.form == "top_k" else "samples"
    return {
        "form": found.manifest.form,
        what: found.manifest.width,
        "bytes_per_token": cache.size(found.folder),
    }
