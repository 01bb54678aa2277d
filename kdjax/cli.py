"""The ``kdjax`` command: one verb is one function, no logic.

A verb's docstring is its help text.
"""

import errno
import hashlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from kdjax import cluster, host
from kdjax import config as configs
from kdjax.errors import UserError, unknown


class Call(NamedTuple):
    """A command line, read: the resolved config, where the run lives, bare words, and the verb's own flags."""

    config: ConfigDict
    workdir: Path
    words: list[str]
    flags: flags.FlagValues


def distill(call: Call) -> None:
    """Train the teacher, the same student alone and the distilled student; print a table; write a report.

    Example:
      kdjax distill
      kdjax distill --config configs/fashion_mnist.py --config.data.data_dir=DATA --config.seed=1 --workdir runs/fashion
    """
    from rich.console import Console

    from kdjax import results
    from kdjax.recipes import distill as recipe

    found = recipe.run(call.config, call.workdir)
    console = Console()
    console.print(results.table(*found))
    console.print(f"report: {call.workdir / 'report.html'}", soft_wrap=True, markup=False)


def train(call: Call) -> None:
    """Train one arm: teacher, student_alone or student_distilled.

    The distilled student learns from the workdir's teacher, or from the one that config.teacher.init names.

    Example:
      kdjax train --arm teacher --workdir runs/teacher
      kdjax train --arm student_distilled --config.teacher.init=runs/teacher --workdir runs/student
    """
    from kdjax.recipes import distill as recipe

    done = recipe.run_one(call.config, call.workdir, call.flags.arm)
    print(f"{call.flags.arm}: {done.steps} steps done; checkpoints in {call.workdir / 'checkpoints' / call.flags.arm}")


def evaluate(call: Call) -> None:
    """Score the arms of a finished workdir again and rewrite its report; the config is the workdir's own.

    Example:
      kdjax evaluate --workdir runs/digits
    """
    from rich.console import Console

    from kdjax import results
    from kdjax.recipes import distill as recipe

    if not call.flags.workdir:
        raise UserError("say which run: kdjax evaluate --workdir FOLDER.")
    found = recipe.evaluate(recipe.saved_config(call.workdir), call.workdir)
    Console().print(results.table(*found))


def report(call: Call) -> None:
    """Show how far a run is, also while it runs: a table, and a page of curves in WORKDIR/progress.html.

    Only reads the run's files, so a run in progress does not notice. Of any workdir that trains.

    Example:
      kdjax report runs/digits
      watch -n 60 kdjax report --workdir runs/digits
    """
    from rich.console import Console

    from kdjax.recipes import report as recipe

    given = [place for place in (call.flags.workdir, *call.words) if place]
    if len(given) != 1:
        raise UserError("say which run: kdjax report WORKDIR.")
    found = recipe.run(Path(given[0]))
    console = Console()
    console.print(recipe.table(found))
    console.print(recipe.summary(found), soft_wrap=True, markup=False)


def check(call: Call) -> None:
    """Test a config before spending device time on it: losses, shapes, teacher, cache, memory, FLOPs.

    Example:
      kdjax check --config configs/cifar100.py:res56_res20 --config.data.data_dir=DATA
    """
    from kdjax.recipes import check as recipe

    recipe.run(call.config, json_output=call.flags.json)


def cache(call: Call) -> None:
    """Ask a language model's teacher about every training window once, and keep what it says in files.

    A run with config.teacher.cache set to that folder then trains without running the teacher. An interrupted cache is
    continued by the same command.

    Example:
      kdjax cache --config configs/lm_bytes.py --workdir runs/lm
      kdjax distill --config configs/lm_bytes.py:cached --config.teacher.init=runs/lm --workdir runs/cached
    """
    from rich.console import Console

    from kdjax.recipes import signals as recipe

    found = recipe.run(call.config, call.workdir)
    Console().print(recipe.table(found, call.workdir / recipe.FOLDER))


def bench(call: Call) -> None:
    """Measure the step, its input, compiling, resuming, many devices, and what distilling is worth over several seeds.

    Of a config: `bench step` times the compiled step against its parts, the host and the machine's own matrix products;
    `bench variants` against itself in other dtypes, with a stored teacher and with its teachers a batch ahead; `bench
    input` the input pipeline alone, `bench compile` the compiler, `bench resume` saves and resumes, and `bench scaling`
    compiles for more and more devices. `bench signals` times the step from a cache against the student alone,
    `bench taps` a feature term against the step without it, `bench population` students side by side against separate
    runs, and `bench loss` compares the memory of the loss over a large vocabulary, chunked, with the dense one.

    `bench seeds` trains all arms over several seeds, `bench compress` the steps of kdjax compress, and `bench omitted`
    repeats the omitted class of Hinton et al. (2015). `bench report` writes the tables of docs/performance.md.

    Example:
      kdjax bench step --json
      kdjax bench variants --config configs/lm_bytes.py
      kdjax bench scaling --devices 16 --config configs/lm_bytes.py
      kdjax bench loss --json --tokens 8192 --vocab 131072
      kdjax bench seeds --seeds 5 --config configs/digits.py:labels10
      kdjax bench report --config.data.data_dir=DATA
    """
    from kdjax.recipes import bench as recipe

    names = recipe.BENCHMARKS
    if len(call.words) != 1 or call.words[0] not in names:
        raise unknown("benchmark", " ".join(call.words), names)
    given = {name: call.flags[name].value for name in ("seconds", "seeds", "tokens", "vocab", "devices", "out")}
    recipe.run(
        call.words[0],
        call.config,
        workdir=call.workdir,
        json_output=call.flags.json,
        **{name: value for name, value in given.items() if value is not None},
    )


def population(call: Call) -> None:
    """Train many students, of several seeds and any traced numbers, in one program beside one teacher.

    Example:
      kdjax population --seeds 16
      kdjax population --seeds 2 --grid losses.kl.temperature=1,2,4,8 losses.kl.weight=0.5,0.9
    """
    from rich.console import Console

    from kdjax.recipes import population as recipe

    grid = recipe.parse_grid(_grid_words(call))
    found = recipe.run(call.config, call.workdir, seeds=call.flags.seeds, grid=grid)
    Console().print(recipe.table(found))


def compare(call: Call) -> None:
    """Compare methods honestly: the control and each method, over several seeds, with paired intervals and a report.

    What is finished is not run again, so more methods, or more seeds, may be asked for later in the same workdir.

    Example:
      kdjax compare --methods kl,dkd,fitnets,crd --seeds 5
      kdjax compare --methods kl,kl+rkd --tune 3 --config configs/digits.py:labels10
      kdjax compare --methods kl --grid losses.kl.temperature=1,2,4,8 losses.kl.weight=0.5,0.7,0.9
    """
    from rich.console import Console

    from kdjax.compare import report
    from kdjax.recipes import compare as recipe
    from kdjax.recipes.methods import METHODS
    from kdjax.recipes.population import parse_grid

    grid = parse_grid(_grid_words(call))
    names = list(METHODS) if call.flags.methods == "all" else [name for name in call.flags.methods.split(",") if name]
    found = recipe.run(
        call.config, call.workdir, names=names, seeds=call.flags.seeds, trials=call.flags.tune, grid=grid
    )
    console = Console()
    console.print(report.table(found))
    console.print(f"report: {call.workdir / 'report.html'}", soft_wrap=True, markup=False)


def compress(call: Call) -> None:
    """Make a model smaller, step by step: prune, factorise, thin out, quantise, and distil after each step.

    The steps are config.compress; the arms they begin with are trained in the workdir, or loaded where they are there.

    Example:
      kdjax compress --config configs/compress.py
      kdjax compress --config configs/compress.py:int4 --workdir runs/int4
    """
    from rich.console import Console

    from kdjax.compress import report
    from kdjax.recipes import compress as recipe

    found = recipe.run(call.config, call.workdir)
    console = Console()
    console.print(report.table(found))
    console.print(f"report: {call.workdir / 'compress.html'}", soft_wrap=True, markup=False)


def export(call: Call) -> None:
    """Hand over a trained model: ONNX (float32, int8, int4, fp8), StableHLO, safetensors or LiteRT, with a model card.

    Each format is a folder under WORKDIR/export/ARM, checked against JAX on the whole test set.

    Example:
      kdjax export runs/digits
      kdjax export runs/digits --arm teacher --format onnx,stablehlo
      kdjax export runs/digits --format onnx-int8 --out deliverables
    """
    from kdjax.recipes import export as recipe

    if len(call.words) != 1:
        raise UserError("say which run: kdjax export WORKDIR.")
    formats = [name for name in call.flags.format.split(",") if name]
    out = Path(call.flags.out) if call.flags.out else None
    recipe.run(Path(call.words[0]), formats=formats, arm=call.flags.arm, out=out)


def measure(call: Call) -> None:
    """Measure exported models as deployed: latency, throughput, bytes, memory, accuracy of the very files.

    Names folders of kdjax export, or ONNX and PyTorch files of your own (FILE.onnx:nchw,scaled); the first one, such as
    the teacher, is what the others are compared with.

    Example:
      kdjax measure runs/digits/export/teacher/onnx runs/digits/export/student_distilled/onnx-int8
      kdjax measure teacher.onnx:nchw runs/digits/export/student_distilled/onnx --workdir runs/measured
    """
    from rich.console import Console

    from kdjax.recipes import measure as recipe

    config = call.config if call.flags.config else None
    found = recipe.run(
        call.words, workdir=call.workdir, config=config, threads=call.flags.threads, calls=call.flags.calls
    )
    console = Console()
    console.print(recipe.table(found))
    console.print(f"report: {call.workdir / recipe.PAGE}", soft_wrap=True, markup=False)


def _grid_words(call: Call) -> list[str]:
    """``--grid A=1,2 B=3,4``: the flag takes the first word, the others follow it."""
    return [word for word in (call.flags.grid, *call.words) if word]


VERBS: dict[str, Callable[[Any], None]] = {
    "distill": distill,
    "train": train,
    "evaluate": evaluate,
    "report": report,
    "check": check,
    "cache": cache,
    "bench": bench,
    "population": population,
    "compare": compare,
    "compress": compress,
    "export": export,
    "measure": measure,
}
_TAKE_WORDS = ("report", "bench", "export", "measure")
_IN_CLUSTERS = ("distill", "train", "evaluate", "cache", "population")
HELP = """kdjax: knowledge distillation in JAX

  kdjax VERB [--config FILE[:VARIANT]] [--config.key=value ...] [--workdir FOLDER]

verbs:
{verbs}

Without --config, a small student is distilled on scikit-learn's digits. kdjax VERB --help shows an example.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 2 bad input (one sentence), 75 another process is gone (to be tried again),
    128 + n stopped by signal n, state saved."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns the exit code."""
    verb = argv[0] if argv else "--help"
    try:
        if verb in ("-h", "--help", "help"):
            return _shown(HELP.format(verbs="\n".join(f"  {name:10} {_summary(verb)}" for name, verb in VERBS.items())))
        if verb not in VERBS:
            raise unknown("verb", verb, VERBS)
        if {"-h", "--help"} & set(argv[1:]):
            text = f"kdjax {verb}\n\n{inspect.getdoc(VERBS[verb])}\n\nflags:{_flags(verb).module_help('kdjax')}"
            return _shown(text)
        call = _parse(verb, argv[1:])
        place = _cluster(call)
    except UserError as error:
        return _refused(error, "--verbose" in argv)
    if place is None:
        return _act(verb, call)
    return cluster.supervise(place, lambda: _as_one_of_many(place, lambda: _act(verb, call)))


def _refused(error: UserError, verbose: bool = False) -> int:
    """Shows bad input as its sentence; returns the exit code."""
    if verbose:
        traceback.print_exc()
    print(f"kdjax: {error}", file=sys.stderr)
    return 2


def _shown(text: str) -> int:
    """Prints a help text, whether or not anybody reads to its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _stop_showing()
    return 0


def _stop_showing() -> None:
    """The reader of our output is gone, such as `head`: closing it at exit shall not fail again."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - it stays open until the process ends


def _as_one_of_many(place: cluster.Cluster, act: Callable[[], int]) -> int:
    """Acts as one process of several, and takes leave of the others."""
    try:
        cluster.join(place)
        code = act()
    except UserError as error:
        return _refused(error)
    except Exception:
        traceback.print_exc()
        cluster.verdict()
        code = 1
    cluster.leave(code)
    return code


def _act(verb: str, call: Call) -> int:
    """Runs a verb and returns the exit code."""
    try:
        host.keep_freed_memory()
        _keep_compiled(call)
        VERBS[verb](call)
    except UserError as error:
        return _refused(error, call.flags.verbose)
    except KeyboardInterrupt:
        print("kdjax: interrupted before a step was made. Run the same command to begin again.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _stop_showing()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS) or call.flags.verbose:
            raise
        place = error.filename or "the workdir"
        print(f"kdjax: cannot write {place}: {error.strerror}; checkpoints written before are kept.", file=sys.stderr)
        return 2
    except Exception as error:
        from kdjax.interrupts import Interrupted

        if not isinstance(error, Interrupted):
            raise
        print(f"kdjax: {error} Run the same command to go on.", file=sys.stderr)
        return 128 + error.signal
    return 0


def _cluster(call: Call) -> cluster.Cluster | None:
    """The processes that this one is to join; ``None`` where it is alone."""
    given = call.flags
    if "cluster" not in given or not (given.cluster or given.coordinator):
        return None
    if given.cluster and given.coordinator:
        raise UserError("--cluster finds the coordinator by itself: leave out --coordinator, or --cluster.")
    if given.coordinator and not (given.processes and given.process is not None and given.process < given.processes):
        raise UserError(
            "--coordinator does not say which process of how many this is: add --processes N and --process I, from 0."
        )
    return cluster.Cluster(given.coordinator or "", given.processes or 0, given.process or 0, given.heartbeat)


def _keep_compiled(call: Call) -> None:
    """Keeps compiled programs where the config says; never where others' could be read, unless it says so."""
    place = call.config.compile_cache
    if place:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(call.workdir / "compiled" if place == "workdir" else place))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _flags(verb: str) -> flags.FlagValues:
    values = flags.FlagValues()

    def define(kind: Callable, name: str, default: Any, text: str, **more: Any) -> None:
        kind(name, default, text, flag_values=values, module_name="kdjax", **more)

    define(flags.DEFINE_string, "config", None, "a config file, or FILE:VARIANT; --config.key=value changes a value")
    define(flags.DEFINE_string, "workdir", None, "where the run lives; a run that is there already is resumed")
    define(flags.DEFINE_bool, "verbose", False, "show the traceback of an error")
    if verb in _IN_CLUSTERS:
        define(flags.DEFINE_bool, "cluster", False, "one of several processes, as SLURM, Kubernetes or a TPU pod says")
        define(flags.DEFINE_string, "coordinator", None, "HOST:PORT of the first of several processes")
        define(flags.DEFINE_integer, "processes", None, "how many there are", lower_bound=1)
        define(flags.DEFINE_integer, "process", None, "which one this is, from 0", lower_bound=0)
        define(flags.DEFINE_float, "heartbeat", 30.0, "seconds without a sign after which one is gone", lower_bound=1.0)
    if verb == "train":
        define(flags.DEFINE_string, "arm", "teacher", "which arm to train")
    if verb == "export":
        define(flags.DEFINE_string, "arm", "student_distilled", "which arm, or step of kdjax compress, to export")
        define(flags.DEFINE_string, "format", "onnx", "names of formats with commas between them")
        define(flags.DEFINE_string, "out", None, "where the folders of the formats go; WORKDIR/export/ARM without it")
    if verb == "measure":
        define(flags.DEFINE_integer, "threads", 1, "of each runtime", lower_bound=1)
        define(flags.DEFINE_integer, "calls", 2000, "timed calls at batch 1 of each model", lower_bound=1)
    if verb in ("check", "bench"):
        define(flags.DEFINE_bool, "json", False, "print one JSON object")
    if verb in ("bench", "compare", "population"):
        default = {"population": 1, "compare": 5}.get(verb)  # each benchmark has its own
        define(flags.DEFINE_integer, "seeds", default, "how many seeds, or members of a population", lower_bound=1)
    if verb == "bench":
        define(flags.DEFINE_float, "seconds", None, "of bench step and variants: of each comparison", lower_bound=0.0)
        define(flags.DEFINE_integer, "tokens", None, "of bench loss: the length of the sequence", lower_bound=1)
        define(flags.DEFINE_integer, "vocab", None, "of bench loss: the number of classes", lower_bound=2)
        define(flags.DEFINE_integer, "devices", None, "of bench scaling: the most devices", lower_bound=2)
        define(flags.DEFINE_string, "out", None, "of bench report: the document whose tables it writes")
    if verb in ("compare", "population"):
        define(
            flags.DEFINE_string, "grid", None, "KEY=VALUE,VALUE ...: numbers of the config to try in all combinations"
        )
    if verb == "compare":
        define(flags.DEFINE_string, "methods", "kl", "names with commas between them, or all; a+b is both at once")
        define(flags.DEFINE_integer, "tune", 1, "how many weights each method may choose from, on held-out examples")
    return values


def _parse(verb: str, argv: Sequence[str]) -> Call:
    values = _flags(verb)
    overrides = [word for word in argv if word.startswith("--config.")]
    try:
        words = values(["kdjax", *(word for word in argv if word not in overrides)])[1:]
    except flags.Error as error:
        sentence = (str(error).splitlines() or ["unreadable flags"])[0].rstrip(".")
        raise UserError(f"{sentence}; kdjax {verb} --help lists the flags.") from error
    if words and verb not in _TAKE_WORDS and not (verb in ("compare", "population") and values.grid):
        raise UserError(f"unexpected {words[0]!r}: values are given as --config.key=value; see kdjax {verb} --help.")
    if verb in ("export", "report") and (values.config or overrides):
        raise UserError(f"kdjax {verb} goes by the config of the run: leave --config out.")
    if verb == "measure" and overrides and not values.config:
        raise UserError(f"{overrides[0]} changes no file: give --config FILE, whose test data are then measured on.")
    base = configs.from_file(values.config) if values.config else configs.default()
    config = configs.resolve(configs.override(base, overrides))
    # A folder of this config's own, so that the same command finds its run again.
    kind = f"{verb}-" if verb in ("compare", "population", "compress") else ""  # which write results of another kind
    own = f"{kind}{config.data.name.replace(':', '-')}-{configs.sha256(config)[:8]}"
    if verb == "compress":
        own += f"-{_short_hash(configs.to_json(config.compress.to_dict()))}"
    if verb == "measure":
        own = f"measure-{_short_hash(' '.join(words))}"
    return Call(config, Path(values.workdir or os.path.join("runs", own)), words, values)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _summary(function: Callable) -> str:
    return (function.__doc__ or "").strip().splitlines()[0]
