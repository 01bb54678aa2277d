"""The steps of ``config.compress``: what each makes of a model, before it is trained.

A model is described by a spec, plain data that builds it again: ``{"name", "options"}`` as in the config, and where
they apply ``ranks`` (of layers in two factors, by path) and ``quantise`` (a rule of :mod:`kdjax.compress.quantise`).
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from kdjax import optimizer
from kdjax.compress import classifiers, decoders, low_rank, quantise, sparsify
from kdjax.errors import UserError, unknown
from kdjax.experiment import ALONE, DISTILLED, MAIN, Experiment
from kdjax.model import Model, Variables, from_nnx
from kdjax.models.decoder import DecoderConfig
from kdjax.tasks import classification, language

Spec = dict[str, Any]
BEFORE = "before"  # as a step's teacher: the model that it was made of
STARTS = (DISTILLED, ALONE, MAIN)  # what the first steps may be made of
CALIBRATION = {"classification": 256, "language": 16}  # training examples by which parts are ranked and scales are set


class Step(NamedTuple):
    """A section of ``config.compress``, complete and checked."""

    name: str
    method: str
    of: str
    teacher: str
    options: dict[str, Any]
    losses: dict[str, dict[str, Any]]
    learning_rate: Any
    epochs: float
    steps: int
    control: bool

    @property
    def trained(self) -> bool:
        """Whether anything is learned after the model is made."""
        return bool(self.epochs or self.steps)


class Made(NamedTuple):
    """What a method makes of a model.

    Attributes:
      spec: of the new model.
      variables: the new model as it is, to be scored.
      first: what its training begins with.
      optimizer: what differs in ``config.optimizer`` while it is trained.
    """

    spec: Spec
    variables: Variables
    first: Variables
    optimizer: Mapping[str, Any] = {}


def plan(config: ConfigDict) -> list[Step]:
    """The steps of a resolved config in their order.

    Raises:
      UserError: no steps, an unknown method or teacher, or a step made of what does not come before it.
    """
    sections = config.compress.to_dict()
    if not sections:
        raise UserError("the config has no steps: set compress, as configs/compress.py does.")
    found: list[Step] = []
    for name, section in sorted(sections.items()):
        where = f"compress.{name}"
        step = Step(name, **section)
        if step.method not in METHODS:
            raise unknown(f"{where}.method", step.method, METHODS)
        _check_options(step, where)
        models = [*STARTS, *(other.name for other in found)]
        if name in STARTS or not re.fullmatch(r"\w[\w-]*", name):
            raise UserError(f"{where}: a step cannot be called so: give a name of letters, digits, _ and - (no arm's).")
        of = step.of or (models[-1] if found else DISTILLED)
        if of not in models:
            raise unknown(f"{where}.of", of, models)
        teacher = step.teacher or (BEFORE if step.method == "quantise" else MAIN)
        if teacher not in (MAIN, BEFORE):
            raise unknown(f"{where}.teacher", teacher, (MAIN, BEFORE))
        found.append(step._replace(of=of, teacher=teacher))
    return found


def _check_options(step: Step, where: str) -> None:
    """Refuses, before anything is trained, what can be seen to be wrong without a model."""
    valid = METHODS[step.method].options
    for option in step.options:
        if option not in valid:
            raise unknown(f"option of {where}", option, valid)
    needed = METHODS[step.method].needs
    if needed and needed not in step.options:
        raise UserError(f"{where}.options has no {needed}: a step that does {step.method} needs it (docs/compress.md).")
    if step.method == "quantise":
        quantise.check_rule(_rule(step.options))
    if step.method == "prune" and not isinstance(step.options["keep"], Mapping):
        raise UserError(f"{where}.options.keep is {step.options['keep']!r}: name parts, such as {{'channels': 0.5}}.")


def spec_of(experiment: Experiment, arm: str) -> Spec:
    """The spec of an arm's model."""
    config = experiment.config
    section = config.teacher if arm == MAIN else config.student
    if arm == DISTILLED and config.student.reuse_classifier:
        raise UserError(
            "a student with its teacher's classifier cannot be compressed: set student.reuse_classifier=False."
        )
    if experiment.task is classification:
        return {"name": section.name, "options": section.options.to_dict()}
    sizes = language.decoder_config(config, section, experiment.dataset)._asdict()
    scaling = sizes["rope_scaling"]
    return {"name": "decoder", "options": {**sizes, "rope_scaling": scaling and scaling._asdict()}}


def build(experiment: Experiment, spec: Spec) -> Model:
    """The model of a spec, for the data and classes of an experiment."""
    config, dataset, count = experiment.config, experiment.dataset, experiment.classes
    part, ranks, rule = part_of(spec), spec.get("ranks", {}), spec.get("quantise")
    if experiment.task is language:
        model = language.make_model(config, part, dataset, count)
        model = low_rank.decoder_with_ranks(model, ranks) if ranks else model
    else:
        factory = classification.make_factory(config, part, dataset, count)
        factory = low_rank.with_ranks(factory, ranks) if ranks else factory
        model = from_nnx(quantise.quantised_inputs(factory, rule) if rule else factory)
    return quantise.fake_quantised(model, rule) if rule else model


def part_of(spec: Spec) -> ConfigDict:
    """A spec as a part of the config, as tasks take it."""
    return ConfigDict({"name": spec["name"], "options": spec["options"], "init": ""}, type_safe=False)


def calibration(experiment: Experiment) -> Any:
    """The first training examples as the models see them, by which parts are ranked and scales are set."""
    count = CALIBRATION[experiment.config.task]
    split = experiment.student_train
    if experiment.task is language:
        some = {"tokens": split.tokens, "segments": split.segments}
        return {name: jnp.asarray(array[:count, :-1], jnp.int32) for name, array in some.items()}
    normalise = classification.make_normalise(experiment.dataset)
    return normalise({"inputs": jnp.asarray(split.inputs[:count])})["inputs"]


def make(experiment: Experiment, step: Step, spec: Spec, variables: Variables) -> Made:
    """What a step makes of a model."""
    if "quantise" in spec:
        raise UserError(
            f"compress.{step.name} is made of {step.of}, which is quantised, so its weights are not what they seem: "
            "quantise last."
        )
    make_it = METHODS[step.method].make
    return make_it(experiment, spec, jax.device_get(variables), f"compress.{step.name}", **step.options)


# ---------------------------------------------------------------------------------------------------------- methods


def _prune(
    experiment: Experiment, spec: Spec, variables: Variables, where: str, *, keep: Mapping[str, float], **options: Any
) -> Made:
    """Fewer channels, heads, hidden units or layers."""
    if "ranks" in spec:
        raise UserError(f"{where} prunes a factorised model: prune first, then factorise.")
    if experiment.task is language:
        made, cut = _pruned_decoder(experiment, spec, variables, where, keep)
    else:
        fits = {"classes": experiment.classes, "input_shape": tuple(experiment.dataset.train.inputs.shape[1:])}
        some = {"inputs": calibration(experiment), **fits}
        made, cut = classifiers.prune(spec["name"], spec["options"], variables, keep=keep, **some, **options)
        cut = jax.device_get(classifiers.recalibrate(spec["name"], made, cut, **some))
    return Made({**spec, "options": made}, cut, cut)


def _pruned_decoder(
    experiment: Experiment, spec: Spec, variables: Variables, where: str, keep: Mapping[str, float]
) -> tuple[dict[str, Any], Variables]:
    whole = language.decoder_config(experiment.config, part_of(spec), experiment.dataset)
    sizes: dict[str, Any] = {}
    for name, share in keep.items():
        if name not in ("width", "layers", "kv_heads", "mlp_width"):
            raise unknown(f"size in {where}.options.keep", name, ("width", "layers", "kv_heads", "mlp_width"))
        size = getattr(whole, name)
        sizes[name] = share if isinstance(share, int) else max(1, round(share * size))
    if "kv_heads" in sizes:
        sizes["heads"] = sizes["kv_heads"] * (whole.heads // whole.kv_heads)
    part: DecoderConfig = whole._replace(**sizes)
    ranked = decoders.importance(whole, variables, calibration(experiment))
    return spec["options"] | sizes, decoders.student_from_teacher(whole, variables, part, importance=ranked)


def _low_rank(experiment: Experiment, spec: Spec, variables: Variables, where: str, **options: Any) -> Made:
    """Layers in two factors."""
    if "ranks" in spec:
        raise UserError(f"{where} factorises a factorised model: leave out one of the two steps.")
    ranks = low_rank.choose(variables["params"], **options)
    if not ranks:
        raise UserError(f"{where} saves no parameters at these ranks: lower its energy or budget, or leave it out.")
    made = {**spec, "ranks": ranks}
    factors = {**variables, "params": low_rank.factorised(variables["params"], ranks)}
    return Made(made, factors, factors)


def _sparsify(experiment: Experiment, spec: Spec, variables: Variables, where: str, **options: Any) -> Made:
    """The smallest weights become 0, at once where it is scored and step by step where it is trained."""
    optimizer.thinning(optax.identity(), options, variables["params"], total_steps=1, steps_per_epoch=1)  # refuses
    params, once = variables["params"], {name: options[name] for name in ("final", "scope", "skip") if name in options}
    at_once = sparsify.sparsify(optax.set_to_zero(), end=0, params_example=params, **once)
    updates, _ = at_once.update(params, at_once.init(params), params)
    thinned = jax.device_get(optax.apply_updates(params, updates))
    return Made(spec, {**variables, "params": thinned}, variables, {"sparsify": options})


def _quantise(experiment: Experiment, spec: Spec, variables: Variables, where: str, **options: Any) -> Made:
    """The same weights, seen through a coarser grid."""
    rule = _rule(options)
    quantise.check_rule(rule, variables["params"])
    made = {**spec, "quantise": rule}
    if not rule["activations"]:
        return Made(made, variables, variables)
    # The scales of activations are state that the model before does not have: they are what one batch says.
    model, state = build(experiment, made), variables["state"]
    fresh = flatten_dict(jax.jit(model.init)(jax.random.key(0))["state"])
    begun = unflatten_dict(fresh | flatten_dict(state))
    _, seen = jax.jit(partial(model.apply, train=True))({**variables, "state": begun}, calibration(experiment))
    scales = {path: x for path, x in flatten_dict(seen).items() if path not in flatten_dict(state)}
    calibrated = jax.device_get({**variables, "state": unflatten_dict(flatten_dict(state) | scales)})
    return Made(made, calibrated, calibrated)


def _rule(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"activations": None, "skip": (), **options}


class Method(NamedTuple):
    """What a step may do: what makes the model, its options, and the one that must be given."""

    make: Callable[..., Made]
    options: tuple[str, ...]
    needs: str = ""


METHODS: dict[str, Method] = {
    "prune": Method(_prune, ("keep", "importance", "multiple"), "keep"),
    "low_rank": Method(_low_rank, ("energy", "budget", "skip")),
    "sparsify": Method(_sparsify, (*optimizer.SPARSE, *optimizer.LENGTHS), "final"),
    "quantise": Method(_quantise, ("weights", "activations", "skip"), "weights"),
}
