"""A trained arm as artefacts: its weights in each format, checked against JAX on the test set, with a model card."""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import checkpoint, memory, results
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.compress import steps
from kdjax.data import tokenizers
from kdjax.errors import UserError, unknown
from kdjax.experiment import DISTILLED, Experiment
from kdjax.export import artefact, card, litert, onnx, safetensors, serving, stablehlo
from kdjax.export.artefact import Artefact
from kdjax.export.serving import Serving
from kdjax.huggingface.load import INDEX, SINGLE
from kdjax.huggingface.save import TOKENISER_FILES
from kdjax.measure import examples, runtimes
from kdjax.model import Model, Variables, first_mismatch
from kdjax.models.decoder import make_decoder
from kdjax.recipes import compress, distill, export_card, score_classification
from kdjax.step import make_predict
from kdjax.tasks import language
from kdjax.untrusted import inside
from kdjax.writers import write_atomic

Say = Callable[[str], None]
CALIBRATION = 256  # training examples from which the ranges of int8 activations are taken
CALIBRATION_WINDOWS = 64  # of a language model, whose examples are hundreds of tokens each
TEST_FLOPS = 2e12  # of a language model's comparison with JAX: under a minute on a CPU, and so many windows, at least:
TEST_WINDOWS = 4
WINDOWS_AT_A_TIME = 4
BOUND = 1e-3  # of the difference from JAX of a logit of a format in float32


class Loaded(NamedTuple):
    """A finished arm of a workdir.

    Attributes:
      experiment: of the workdir, in float32 and on one device.
      part: the section of the config that says what the model is: ``name`` and ``options``.
      model: the arm's.
      variables: its weights, on the host.
      quantise: the rule that it was trained with (see ``compress.quantise``); ``None``: none.
      trained: the model as it was trained, where that is more than ``model`` with rounded weights.
    """

    experiment: Experiment
    part: ConfigDict
    model: Model
    variables: Variables
    quantise: dict[str, Any] | None = None
    trained: Model | None = None


class Format(NamedTuple):
    """A format by name.

    Attributes:
      write: ``(loaded, serving, folder, calibration) -> facts``: puts the model's files into a folder; of the facts,
        ``model`` and ``weights_bytes`` go into the manifest.
      runtime: that runs it (see ``measure.runtimes``); ``None``: weights alone.
      packages: that are needed, as they are imported.
      extra: of kdjax, that installs them.
      exact: whether it holds the model as it was trained, so that it must answer as JAX does.
      fixed: whether the input has one shape.
    """

    write: Callable[[Loaded, Serving, Path, np.ndarray], Mapping[str, Any]]
    runtime: str | None
    packages: tuple[str, ...]
    extra: str
    exact: bool = False
    fixed: bool = False


def _write_onnx(
    precision: str, loaded: Loaded, one: Serving, folder: Path, calibration: np.ndarray
) -> Mapping[str, Any]:
    return {
        "model": "model.onnx",
        **onnx.write(one, folder / "model.onnx", precision=precision, calibration=calibration),
    }


def _write_stablehlo(loaded: Loaded, one: Serving, folder: Path, calibration: np.ndarray) -> Mapping[str, Any]:
    path = folder / "model.stablehlo"
    return {"model": path.name, **stablehlo.write(one, path)}


def _write_litert(int8: bool, loaded: Loaded, one: Serving, folder: Path, calibration: np.ndarray) -> Mapping[str, Any]:
    path, length = folder / "model.tflite", _context(loaded) or 0
    return {"model": path.name, **litert.write(one, path, length=length, calibration=calibration if int8 else None)}


def _write_safetensors(loaded: Loaded, one: Serving, folder: Path, calibration: np.ndarray) -> Mapping[str, Any]:
    """A decoder in the layout of Hugging Face, tokenizer and all; any other model by the paths of its arrays."""
    if not _has_architecture(loaded):
        options = loaded.part.options.to_dict()
        safetensors.write(loaded.variables, folder / SINGLE, name=loaded.part.name, options=options)
        return {"model": SINGLE}
    config = loaded.experiment.config
    as_student = ConfigDict({**config.to_dict(), "student": loaded.part.to_dict()}, type_safe=False)
    language.hand_over(as_student, loaded.experiment.dataset, loaded.variables, folder)
    return {"model": SINGLE if (folder / SINGLE).is_file() else INDEX}


def _onnx(precision: str) -> Format:
    packages = ("jax2onnx", "onnx", "onnxruntime")
    return Format(partial(_write_onnx, precision), "onnxruntime", packages, "export", exact=precision == "float32")


def _litert(int8: bool) -> Format:
    packages = ("tensorflow", "ai_edge_litert")
    return Format(partial(_write_litert, int8), "litert", packages, "litert", exact=not int8, fixed=True)


FORMATS: dict[str, Format] = {
    "onnx": _onnx("float32"),
    "onnx-int8": _onnx("int8"),
    "onnx-int8-dynamic": _onnx("int8-dynamic"),
    "onnx-int8-weights": _onnx("int8-weights"),
    "onnx-int4": _onnx("int4"),
    "onnx-fp8": _onnx("fp8"),
    "stablehlo": Format(_write_stablehlo, "jax", ("jax",), "export", exact=True),
    "safetensors": Format(_write_safetensors, None, ("safetensors",), "text", exact=True),
    "litert": _litert(int8=False),
    "litert-int8": _litert(int8=True),
}


def run(
    workdir: Path,
    *,
    formats: Sequence[str],
    arm: str = DISTILLED,
    out: Path | None = None,
    teacher_licence: str = "",
    data_licence: str = "",
    say: Say = print,
) -> list[Artefact]:
    """Writes an arm of a finished workdir in each format, into ``out/FORMAT``.

    Each artefact is there whole or not at all: it is compared with JAX on the test set before it gets its name.

    Args:
      workdir: of a run.
      formats: names in ``FORMATS``.
      arm: which one.
      out: ``WORKDIR/export/ARM`` where it is not given.
      teacher_licence: a note for the card, in the place of ``licences.teacher`` of the workdir's config.
      data_licence: the same of ``licences.data``.
      say: told about each artefact.

    Raises:
      UserError: an unknown format or arm, a package that is not installed, a workdir or an arm that is not finished, an
        artefact that exists, an operation that a format lacks, or a file that does not answer as JAX does.
    """
    workdir = Path(workdir)
    out = workdir / "export" / arm if out is None else Path(out)
    if not formats:
        raise UserError(f"say which formats: --format with some of {', '.join(FORMATS)}, with commas between them.")
    for name in formats:
        _check_format(name)
        artefact.check_free(out / name)
    loaded = load_arm(workdir, arm)
    one = serving.make_serving(
        loaded.experiment, loaded.model, loaded.variables, loaded.part, loaded.quantise, loaded.trained
    )
    noted = loaded.experiment.config.get("licences", {"teacher": "", "data": ""})
    licences = {"teacher": teacher_licence or noted["teacher"], "data": data_licence or noted["data"]}
    facts = export_card.facts(workdir, loaded.experiment, loaded.part, arm, licences)
    teacher = _teacher_logits(workdir, loaded, arm, say)
    done = []
    for name in dict.fromkeys(formats):
        done.append(artefact.write(out / name, partial(_fill, name, loaded, one, arm, facts, teacher)))
        say(_sentence(done[-1]))
    return done


def load_arm(workdir: Path, arm: str) -> Loaded:
    """The model and the weights of a finished arm: a teacher, a link of a chain, a student, or a compression step.

    The one place that knows which arms a workdir has.

    Raises:
      UserError: not a workdir, no such arm, or one that is not finished.
    """
    experiment = _experiment(workdir)
    if arm in compress.names(workdir):
        found = compress.load(experiment, workdir, arm)
        rule = found.spec.get("quantise")
        model = steps.build(experiment, {**found.spec, "quantise": None})  # as it is without the rounding
        return Loaded(experiment, steps.part_of(found.spec), model, found.variables, rule, found.model)
    if arm not in experiment.arms:
        raise unknown("arm", arm, [*experiment.arms, *compress.names(workdir)])
    config, model = experiment.config, experiments.model_of(experiment, arm)
    part = config.student
    if arm in experiment.teachers:
        part = experiments.member(config, arm)
    elif arm in experiment.links:
        part = experiment.links[arm].config.student
    variables = experiments.load_teacher(experiment, arm)
    if variables is None:
        distill.require_finished(experiment, arm, workdir)
        variables = experiments.load_weights(model, Path(workdir) / "checkpoints" / arm)
    return Loaded(experiment, part, model, jax.device_get(variables))


def _experiment(workdir: Path) -> Experiment:
    """The experiment of a workdir, in float32 on one device, wherever and however it was trained."""
    saved = configs.resolve(distill.saved_config(workdir))
    here = ConfigDict(saved.to_dict(), type_safe=False)
    here.mesh, here.teacher_mesh = {"data": 1, "fsdp": 1}, {}
    here.train.update(dtype="float32", products="")
    here.teacher.weights = ""
    return experiments.load(here)._replace(config_sha256=configs.sha256(saved))


def _check_format(name: str) -> None:
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    for package in FORMATS[name].packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the format {name} needs {package}: run pip install 'kdjax[{FORMATS[name].extra}]'.")


# ------------------------------------------------------------------------------------------------------ an artefact


def _fill(
    name: str,
    loaded: Loaded,
    one: Serving,
    arm: str,
    facts: Mapping[str, Any],
    teacher: np.ndarray | None,
    folder: Path,
) -> dict[str, Any]:
    """Puts the files of an artefact into a folder, and returns its manifest."""
    form, experiment = FORMATS[name], loaded.experiment
    dataset, is_text = experiment.dataset, experiment.config.task == "language"
    written = form.write(loaded, one, folder, _calibration(loaded))
    file_bytes = sum(path.stat().st_size for path in folder.glob("model*"))
    parity, logits = _parity(name, loaded, one, folder / written["model"])
    sizes = {"batch": 1, "length": _context(loaded)} if form.fixed else {}
    shape = lambda names: [sizes.get(size, size) for size in names]
    about = {
        "format": name,
        "runtime": form.runtime,
        "model": written["model"],
        "task": experiment.config.task,
        "arm": arm,
        "input": {"name": one.input_name, "shape": shape(one.input_shape), "dtype": one.input_dtype},
        "output": {"name": "logits", "shape": shape(one.output_shape), "dtype": "float32"},
        "context": _context(loaded),
        "labels": None if is_text else list(dataset.class_names),
        "preprocessing": None if is_text else _preprocessing(dataset),
        "params": results.count(loaded.variables),
        "weights_bytes": written.get("weights_bytes", results.weigh(loaded.variables)),
        "file_bytes": file_bytes,
        "config_sha256": experiment.config_sha256,
        "params_sha256": checkpoint.digest(loaded.variables),
        "data": {"task": experiment.config.task, **json.loads(configs.to_json(experiment.config.data.to_dict()))},
        "parity": parity,
    }
    classes = None if is_text else export_card.by_class(dataset, logits, teacher)
    versions = facts["versions"] | export_card.versions(form.packages)
    about_it = card.make({"artefact": about, **facts, "classes": classes, "versions": versions})
    text = card.markdown(about_it)
    write_atomic(folder / artefact.CARD, text)
    write_atomic(folder / artefact.CARD_JSON, json.dumps(about_it, indent=2, allow_nan=False) + "\n")
    if name == "safetensors" and _has_architecture(loaded):
        write_atomic(folder / "README.md", card.FRONT_MATTER + text)
    elif is_text:
        _write_tokenizer(experiment.config.data.tokenizer, folder)
    return about


def _parity(name: str, loaded: Loaded, one: Serving, path: Path) -> tuple[dict[str, Any] | None, np.ndarray]:
    """How the file answers beside JAX on the test set, and a classifier's logits [examples, classes].

    Raises:
      UserError: it does not answer as JAX does.
    """
    form, is_text = FORMATS[name], loaded.experiment.config.task == "language"
    inputs, targets = _test(loaded)
    counted = targets >= 0 if is_text else np.ones(targets.shape, bool)  # the rest of a window is padding
    batch = WINDOWS_AT_A_TIME if is_text else loaded.experiment.config.data.eval_batch_size
    wanted = _in_jax(loaded, one)
    call = runtimes.open_model(path, form.runtime).call if form.runtime else wanted
    apart, agree, right, kept = 0.0, 0, 0, []
    for start in range(0, len(inputs), batch):
        now = slice(start, start + batch)
        expected, found = wanted(inputs[now]), call(inputs[now])
        apart = np.maximum(apart, np.abs(found - expected).max())  # unlike max(), it keeps a NaN
        first = found.argmax(-1)
        agree += int((first == expected.argmax(-1))[counted[now]].sum())
        right += int((first == targets[now]).sum())
        kept += [] if is_text else [found]
    # Ranges of rounded activations are found anew by whoever runs the file.
    exact = form.exact and not (loaded.quantise or {}).get("activations")
    if not np.isfinite(apart) or (exact and apart > BOUND):
        raise UserError(
            f"the file in the format {name} differs from JAX by {apart:.3g} on the test set, and {BOUND:g} is allowed: "
            "choose another format, or another version of the packages that write and run it."
        )
    parity = {
        "examples": len(inputs),
        "max_abs_difference": float(apart),
        "agreement": agree / int(counted.sum()),
        "accuracy": right / max(int((targets >= 0).sum()), 1),
    }
    return parity if form.runtime else None, np.concatenate(kept) if kept else np.zeros((0, 0), np.float32)


def _in_jax(loaded: Loaded, one: Serving) -> Callable[[np.ndarray], np.ndarray]:
    """What the file is held against: the model as it is scored in training, not as it was rebuilt for the export; of a
    student that was trained with quantisation, its reference."""
    is_text = loaded.experiment.config.task == "language"
    normalise = None if is_text else loaded.experiment.task.make_normalise(loaded.experiment.dataset)
    predict = jax.jit(make_predict(loaded.model, normalise))
    reference = jax.jit(one.reference)

    def wanted(raw: np.ndarray) -> jax.Array:
        if loaded.quantise:
            return reference(raw)
        return predict(loaded.variables, {"inputs": {"tokens": raw} if is_text else raw})

    def call(raw: np.ndarray) -> np.ndarray:
        with jax.default_matmul_precision("highest"):  # also where products are shortened by default
            return np.asarray(wanted(raw))

    return call


def _test(loaded: Loaded) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the test split as a file takes them, and the targets of its logits; -1: none."""
    test = loaded.experiment.dataset.test
    if loaded.experiment.config.task != "language":
        return test.inputs, test.labels
    flops = 2 * results.count(loaded.variables) * loaded.experiment.dataset.context  # of a window
    count = max(int(TEST_FLOPS / flops), TEST_WINDOWS)
    inputs, targets, _ = examples.rows_of(jax.tree.map(lambda array: array[:count], test))
    return inputs[:count], targets[:count]


def _calibration(loaded: Loaded) -> np.ndarray:
    train = loaded.experiment.dataset.train
    if loaded.experiment.config.task == "language":
        return train.tokens[:CALIBRATION_WINDOWS, :-1].astype(np.int32)
    return train.inputs[:CALIBRATION]


def _context(loaded: Loaded) -> int | None:
    """The longest sequence that a decoder was trained on; ``None`` of a classifier."""
    return loaded.experiment.dataset.context if loaded.experiment.config.task == "language" else None


def _has_architecture(loaded: Loaded) -> bool:
    """Whether the arm is a decoder just as ``models.decoder`` makes it, which Hugging Face's layout can hold."""
    config = loaded.experiment.config
    if config.task != "language":
        return False
    sizes = language.decoder_config(config, loaded.part, loaded.experiment.dataset)
    shapes = jax.eval_shape(make_decoder(sizes).init, jax.random.key(0))["params"]
    return first_mismatch(shapes, loaded.variables["params"]) is None


def _preprocessing(dataset: Any) -> dict[str, Any]:
    scale = 1 / 255 if dataset.train.inputs.dtype == np.uint8 else 1.0
    return {
        "inside": True,
        "scale": scale,
        "mean": list(map(float, dataset.mean)),
        "std": list(map(float, dataset.std)),
    }


def _write_tokenizer(place: str, folder: Path) -> None:
    if place == tokenizers.BYTES:
        tokenizers.write_byte_tokenizer(folder)
        return
    for name in TOKENISER_FILES:
        path = inside(tokenizers.folder_of(place), name)
        if path.is_file():
            shutil.copyfile(path, folder / name)


def _teacher_logits(workdir: Path, loaded: Loaded, arm: str, say: Say) -> np.ndarray | None:
    """What the teachers of a classifier say together of the test set; ``None`` where there are none at hand."""
    experiment = loaded.experiment
    if experiment.config.task == "language" or arm in experiment.teachers:
        return None
    size = experiment.config.data.eval_batch_size
    try:
        weights = {name: load_arm(workdir, name).variables for name in experiment.teachers}
    except UserError as error:
        say(f"the card goes without the teacher's accuracy by class: {error}")
        return None
    make_score = partial(experiment.task.make_score, dataset=experiment.dataset, mesh=experiment.mesh, batch_size=size)
    said = {name: make_score(experiment.teachers[name])(weights[name], experiment.dataset.test) for name in weights}
    return score_classification.combined(experiment, said)


def _sentence(one: Artefact) -> str:
    about, text = one.manifest, memory.bytes_text
    parity = about["parity"]
    size = f"{about['params']:,} parameters, weights {text(about['weights_bytes'])}, file {text(about['file_bytes'])}"
    if parity is None:
        return f"{one.folder}: {size}"
    return (
        f"{one.folder}: {size}; accuracy {100 * parity['accuracy']:.2f} % on {parity['examples']:,} test examples, "
        f"agrees with JAX on {100 * parity['agreement']:.2f} % (largest difference {parity['max_abs_difference']:.2g})"
    )
