"""The configuration: every key and its default. ``default()`` is the digits experiment; a file changes what differs."""

import ast
import hashlib
import json
import re
import runpy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from kdjax import objective
from kdjax.errors import UserError, unknown

# Subtrees in which a user may add keys; what is put there is checked by the code that reads it.
_OPEN = (
    *("data.options", "teacher.options", "teacher.augment", "student.options"),
    *("more_teachers", "assistants", "peers", "stages", "compress", "mesh", "teacher_mesh"),
)
# What does not change the result of an arm, and so may change when a run is resumed.
_FREE = (
    *("checkpoint", "log", "compress", "licences", "compile_cache"),
    *("mesh", "teacher_mesh", "sharding"),  # but for rounding
)


def default() -> ConfigDict:
    """A small convolutional student of a larger teacher on scikit-learn's digits: half a minute on two CPU cores."""
    config = ConfigDict(type_safe=False)
    config.seed = 0
    config.task = "classification"  # or language
    config.data = {
        "name": "digits",  # digits, synthetic, or tfds:NAME; text: stdlib, text:FILES, jsonl:FILES, or tfds:NAME
        "data_dir": "",  # where tensorflow-datasets finds prepared data; empty: its own default
        "options": {},  # of the source, such as shape and classes of the synthetic one
        "batch_size": 64,  # over all devices
        "eval_batch_size": 256,
        "tokenizer": "bytes",  # of text: bytes, or a tokenizer.json or the folder of one
        "context": 256,  # of text: tokens of a window, each with its target
        "packing": "split",  # of text: documents cut where a window ends, or whole
        "corrupt": "stop",  # or skip: records that cannot be read are left out
        "labels": 1.0,  # share of the training examples whose labels the student may see
        "omit_class": -1,  # a class whose examples the student never sees (-1: none)
        "curriculum": {  # of the distilled student: which examples it sees first, as the teacher finds them hard
            "pacing": "none",  # or linear, root, step: how the pool of examples grows
            "start": 0.3,  # share of the examples in the pool at step 0
            "full_percent": 50.0,  # of the run, at which all are in
            "order": "easy_first",  # or hard_first, random
        },
        "augment": {
            "crop_padding": 1,  # pixels
            "flip": False,
            "randaugment": {"layers": 0, "magnitude": 9.0},
            "random_resized_crop": 0.0,  # smallest share of the area; 0: off
            "mixup": 0.0,  # alpha of the Beta distribution; 0: off
            "cutmix": 0.0,
        },
    }
    config.teacher = {
        "name": "cnn",
        "options": {"widths": (32, 64, 128), "strides": (1, 2, 2)},
        "init": "",  # a kdjax workdir or checkpoint folder, or a Hugging Face folder; empty: trained in this run
        "weights": "",  # stored for inference in bfloat16, int8 or float8_e4m3; empty: as they are loaded
        "cache": "",  # of a language model: what the teacher said beforehand (kdjax cache), asked in its place
        "weight": 1.0,  # among several teachers
        "combine": "probabilities",  # or logits, confidence, routed
        "labels": 1.0,
        "augment": {},  # what differs from data.augment while the teacher itself is trained
        "epochs": 40,
        "steps": 0,  # if not 0, instead of epochs
        "optimizer": _optimizer(learning_rate=_cosine(2e-3)),
        "losses": {"ce": {"weight": 1.0, "label_smoothing": 0.0}},
    }
    config.more_teachers = {}  # name -> {name, options, init, weights, weight}
    config.student = {
        "name": "cnn",
        "options": {"widths": (8, 16, 16), "strides": (1, 2, 2)},
        "init": "",  # of a language model: a Hugging Face folder, or teacher: a part of it; empty: random weights
        "seed": 0,  # of its weights and dropout, beside the run's
        "reuse_classifier": False,  # the distilled student ends in the teacher's own classifier (SimKD)
    }
    config.assistants = {}  # name -> {name, options, init}: between teacher and student, in the order of their names
    config.generations = 1  # how often the student is distilled, each time from the student before
    config.peers = {}  # name -> {name, options}: they learn beside the student and from each other (losses.mutual)
    config.losses = objective.default_losses()  # every term, switched off
    config.losses.kl.update(weight=0.9, temperature=4.0)
    config.losses.ce.update(weight=0.1)
    config.balance = "fixed"  # or uncertainty, dwa: how terms are weighed among each other beside their weights
    config.control = {"losses": {"ce": {"weight": 1.0, "label_smoothing": 0.0}}}  # of the same student alone
    # name -> {percent|epochs|steps, losses: what differs from config.losses}; run in the order of their names.
    config.stages = {}
    config.optimizer = _optimizer(learning_rate=_cosine(4e-3))
    config.train = {
        "epochs": 60,
        "steps": 0,  # if not 0, instead of epochs
        "accumulate": 1,  # parts of a batch that are walked over one after the other
        "tokens_per_chunk": 0,  # of a device, for which logits exist at a time; 0: as many as a fixed budget holds
        "dtype": "float32",  # of the computation; the student's parameters are float32 always
        "products": "",  # of dense layers: float8, where the rest is of dtype; empty: of dtype as well
        "ema": 0.0,  # decay of the student's moving average; 0: none
        "stop_on_nan": True,
        "skip_nan": 0,  # steps in a row that may be left out where loss or gradient is not finite; 0: none
        "overlap": False,  # the teachers run a batch ahead, beside the student's update in one program
    }
    config.mesh = {"data": -1, "fsdp": 1}  # -1: all devices that are left
    # Of devices after those of the mesh, on which the teachers run a batch ahead; empty: they share the mesh.
    config.teacher_mesh = {}
    config.sharding = {"student": ((".*", "fsdp"),), "teacher": ((".*", "fsdp"),)}
    config.cache = {  # of kdjax cache: what is kept of a teacher's distribution of each token
        "form": "top_k",  # its k likeliest tokens and the rest; or sample: an unbiased sample of it
        "k": 32,
        "samples": 50,  # at most; fewer where bytes_per_token asks for it
        "bytes_per_token": 40.0,  # of a sample, on average
        "examples_per_shard": 1024,
        "examples_per_batch": 0,  # 0: data.eval_batch_size
    }
    # name -> what differs from STEP: steps from a model to a smaller one, each trained after it (kdjax compress), in
    # the order of their names.
    config.compress = {}
    config.licences = {"teacher": "", "data": ""}  # a note on each, for the model card of an export
    config.population = {"chunk": 0}  # students at a time in a population; 0: as measured at its start
    # Where compiled programs are kept for the next start: a folder of your own, or workdir; empty: nowhere.
    config.compile_cache = ""
    config.checkpoint = {"every": 200, "keep": 2, "keep_best": True}
    config.log = {
        "every": 20,
        "eval_every": 100,
        "stall_s": 120.0,  # after which a run in which nothing moves says what it waits for; 0: never
        "stall_exit_s": 0.0,  # after which it ends, to be tried again; 0: never
        "profile": (),  # the first and the last step of a profiler trace of each arm; empty: none
        "tensorboard": False,
        "wandb": "",  # the project of Weights & Biases that metrics go to as well; empty: none
        "sample": {"tokens": 160, "temperature": 0.7},  # of the text that each arm of a language model writes
    }
    return config


# A step of ``config.compress``.
STEP: dict[str, Any] = {
    "method": "",  # prune, low_rank, sparsify or quantise
    "of": "",  # the step, or the arm, whose model it is made of; empty: the step before, the distilled student at first
    "teacher": "",  # teacher, or before: the model it is made of; empty: before for quantise, else teacher
    "options": {},  # of the method
    "losses": {},  # what differs from config.losses
    "learning_rate": None,  # a number, or a schedule over the step; None: config.optimizer.learning_rate
    "epochs": 0,  # with steps 0 as well: not trained
    "steps": 0,
    "control": True,  # also trained without a teacher, by config.control.losses and with as many updates
}


def from_file(place: str) -> ConfigDict:
    """The config of ``FILE`` or ``FILE:VARIANT``: what its ``get_config(variant)`` returns.

    Raises:
      UserError: no such file, no ``get_config``, or whatever the file raises.
    """
    path, _, variant = place.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no config file {path}: give the path of a Python file with get_config().")
    try:
        config = runpy.run_path(path)["get_config"](variant) if variant else runpy.run_path(path)["get_config"]()
    except UserError:
        raise
    except KeyError as error:
        raise UserError(
            f"{path} does not define {error}: a config file has a function get_config(variant='')."
        ) from error
    except Exception as error:  # a config is Python, so it may raise anything
        raise UserError(f"{path} raised {type(error).__name__}: {str(error).rstrip('.')}.") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config of {path} returned a {type(config).__name__} and should return a ConfigDict.")
    return config


def _optimizer(**changes: Any) -> dict[str, Any]:
    return {
        "name": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": None,
        "clip_norm": None,  # bound of the global norm
        "momentum": None,
        "nesterov": None,
        "b1": None,
        "b2": None,
        "eps": None,
        "decay": None,
        "centered": None,
        "decay_mask": None,  # regexes of the parameters that decay; None: those with 2 dimensions or more
        "freeze": None,  # regexes of parameters that stay as they are
        "sparsify": None,  # {"final": share of the weights that become 0, ...}: see optimizer.thinning
        **changes,
    }


def _cosine(peak: float, warmup_percent: float = 5.0) -> dict[str, Any]:
    return {"schedule": "cosine", "init": peak, "end": 0.0, "warmup_percent": warmup_percent}


def resolve(config: ConfigDict) -> ConfigDict:
    """A locked copy of a config, checked against ``default()`` for keys and types.

    Raises:
      UserError: an unknown key (names the nearest) or a value of the wrong type.
    """
    config = _filled(config)
    _check(config.to_dict(), default().to_dict(), "")
    _check(config.teacher.augment.to_dict(), default().data.augment.to_dict(), "teacher.augment.")
    for name, stage in config.stages.items():
        _check(stage.to_dict().get("losses", {}), default().losses.to_dict(), f"stages.{name}.losses.")
    for name, step in config.compress.items():
        section = step.to_dict()
        _check(section.pop("losses"), default().losses.to_dict(), f"compress.{name}.losses.")
        _check(section, STEP, f"compress.{name}.")
    for name, extra in config.more_teachers.items():
        _check(
            extra.to_dict(), {key: default().teacher.to_dict()[key] for key in MEMBER_KEYS}, f"more_teachers.{name}."
        )
    for name, extra in config.assistants.items():
        _check(extra.to_dict(), {"name": "", "options": {}, "init": ""}, f"assistants.{name}.")
    for name, extra in config.peers.items():
        _check(extra.to_dict(), {"name": "", "options": {}}, f"peers.{name}.")
        if "name" not in extra:  # one of the student's kind
            extra.update(name=config.student.name, options=extra.get("options", config.student.options))
        extra.options = extra.get("options", {})
    try:
        to_json(config.to_dict())
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"a config holds numbers, texts, lists and mappings of these ({error}): mend its options."
        ) from error
    return config.lock()


def _require_sections(config: ConfigDict) -> None:
    """What the rest of this module goes by; the ``config.json`` of a workdir from elsewhere may hold anything."""
    for key in (*_SECTIONS, *_NAMED):
        value = config.get(key, {} if key == "compress" else None)
        _require(isinstance(value, ConfigDict | Mapping), key, "a mapping", value)
    _require(isinstance(config.teacher.get("augment"), ConfigDict), "teacher.augment", "a mapping", config.teacher)
    for key in _NAMED:
        for name, part in config.get(key, {}).items():
            _require(isinstance(part, ConfigDict), f"{key}.{name}", "a mapping", part)
            if not re.fullmatch(r"\w[\w-]*", name):
                raise UserError(
                    f"{key} has the name {name!r}: take letters, digits, _ and -, for it names a folder too."
                )


_SECTIONS = ("data", "teacher", "student", "losses", "control", "optimizer", "train", "mesh", "checkpoint", "log")
_NAMED = ("more_teachers", "assistants", "peers", "stages", "compress")  # whose keys are names


def _filled(config: ConfigDict) -> ConfigDict:
    """A copy with what a part that is set as a whole, or the config of an older workdir, leaves out."""
    config, defaults = ConfigDict(config.to_dict(), type_safe=False), default()
    _require_sections(config)
    for name, step in config.get("compress", {}).items():
        config.compress[name] = {**STEP, **step.to_dict()}
    for section in ("data", "train", "checkpoint", "log", "teacher", "student"):
        for key, value in defaults[section].items():
            if key not in config[section] and key != "options":  # those are of the model that it names
                config[section][key] = value
    for key, value in defaults.items():
        if key not in config:
            config[key] = value
    return config


MEMBER_KEYS = ("name", "options", "init", "weights", "weight")


def override(config: ConfigDict, words: Sequence[str]) -> ConfigDict:
    """A copy of a config with ``--config.key=value`` words applied.

    Values are Python literals (``3``, ``1e-3``, ``(8,16)``, ``None``, ``{'schedule': ...}``) or plain strings. Unlike
    ml_collections' own flags this may put a number in the place of a schedule, a schedule in the place of a number,
    and a value where the default is None. Naming another model without options clears the options of the one before.

    Raises:
      UserError: an unknown key (names the nearest), or a word without a value.
    """
    changed = _filled(config)
    named = {word.removeprefix("--config.").partition("=")[0] for word in words}
    for part in ("teacher", "student"):
        if f"{part}.name" in named and not any(key.startswith(f"{part}.options") for key in named):
            changed[part].options = {}
    for word in words:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            raise UserError(f"{word} has no value: write {word}=VALUE.")
        *parents, last = key.split(".")
        place: Any = changed
        for number, parent in enumerate(parents):
            if not isinstance(place, ConfigDict) or parent not in place:
                raise unknown_key(".".join(parents[: number + 1]), flat_keys(changed.to_dict()))
            place = place[parent]
        if not isinstance(place, ConfigDict) or (last not in place and ".".join(parents) not in _OPEN):
            raise unknown_key(key, flat_keys(changed.to_dict()))
        value = _literal(text, place.get(last))
        try:
            flat_keys({key: value})  # joins names by full stops
            place[last] = value
        except (TypeError, ValueError, RecursionError) as error:  # a mapping whose keys are no names
            raise UserError(f"{key} cannot be {text} ({error}): give its keys as texts without a full stop.") from error
    return changed


def _literal(text: str, before: Any) -> Any:
    if isinstance(before, str):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # resolve says what it should have been


def sha256(config: ConfigDict) -> str:
    """The identity of an experiment: a hash of all that can change its result."""
    kept = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    return hashlib.sha256(to_json(kept).encode()).hexdigest()


def to_json(values: Mapping[str, Any]) -> str:
    """A config (or a part of it) as JSON, in the order of its keys (ConfigDict sorts them)."""
    return json.dumps(values, indent=2)


def differences(before: ConfigDict, after: ConfigDict) -> list[str]:
    """The keys in which two configs differ, of those that can change a result."""
    was, now = ({k: v for k, v in json.loads(to_json(c.to_dict())).items() if k not in _FREE} for c in (before, after))
    was, now = flat_keys(was), flat_keys(now)
    is_leaf = lambda key: not isinstance(was.get(key), dict) or not isinstance(now.get(key), dict)
    return sorted(
        key for key in {*was, *now} if (key in was) != (key in now) or (was[key] != now[key] and is_leaf(key))
    )


def flat_keys(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a": {...}, "a.b": 1}``: every key that can be named on the command line."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat[prefix + key] = value  # a TypeError for a key that is no text
        if isinstance(value, Mapping):
            flat |= flat_keys(value, f"{prefix}{key}.")
    return flat


def unknown_key(key: str, valid: Mapping[str, Any]) -> UserError:
    """The error for a key that no config has, with the nearest right one."""
    parent = key.rpartition(".")[0]
    siblings = [name for name in valid if name.rpartition(".")[0] == parent] or list(valid)
    return unknown("config key", key, siblings)


def _check(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str) -> None:
    for key, value in found.items():
        path = prefix + key
        if key not in expected:
            raise unknown_key(path, {prefix + name: None for name in expected})
        sections = ("more_teachers.", "assistants.", "peers.", "compress.")
        if path in _OPEN or (prefix.startswith(sections) and key == "options"):
            _require(isinstance(value, Mapping), path, "a mapping of options", value)
        elif _is_schedule(value) and isinstance(expected[key], int | float | Mapping):
            continue  # schedules.make checks it
        elif isinstance(expected[key], Mapping) and not _is_schedule(expected[key]):
            _require(isinstance(value, Mapping), path, "a mapping", value)
            _check(value, expected[key], f"{path}.")
        else:
            _check_leaf(value, expected[key], path)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, Mapping) and "schedule" in value


def _check_leaf(value: Any, expected: Any, path: str) -> None:
    if expected is None:
        return  # an optimiser option: optimizer.make checks it
    if _is_schedule(expected) or isinstance(expected, float) or path.endswith(".epochs"):
        _require(isinstance(value, int | float) and not isinstance(value, bool), path, "a number", value)
    elif isinstance(expected, tuple):
        _require(isinstance(value, tuple | list), path, "a list", value)
    else:
        _require(type(value) is type(expected), path, type(expected).__name__, value)


def _require(holds: bool, path: str, wanted: str, value: Any) -> None:
    if not holds:
        raise UserError(f"config.{path} is {value!r} ({type(value).__name__}) and should be {wanted}.")
