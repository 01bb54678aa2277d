"""``kdjax bench``: measurements that anyone can repeat: the step, its input, its compilation, saving and resuming, many
devices, the loss over a large vocabulary, what a population and a cache save and what taps cost, several seeds, a class
that was never seen, steps of compression; and the document that holds them."""

import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from kdjax import build, results
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.errors import UserError, unknown
from kdjax.experiment import ALONE, DISTILLED, MAIN, STUDENTS
from kdjax.recipes import (
    bench_compile,
    bench_compress,
    bench_input,
    bench_loss,
    bench_population,
    bench_report,
    bench_resume,
    bench_scaling,
    bench_signals,
    bench_step,
    bench_taps,
    bench_variants,
    distill,
)
from kdjax.statistics import mean_and_sd, mean_interval
from kdjax.tasks import classification
from kdjax.writers import write_atomic

SEEDS = 5
OMITTED_CLASS = 3  # of Hinton et al. 2015, section 3
OMITTED_TEMPERATURE = 20.0


class Found(NamedTuple):
    """What a benchmark measured: for JSON, and as a table for people."""

    values: dict[str, Any]
    table: Table


def run(name: str, config: ConfigDict, *, workdir: Path, json_output: bool = False, **sizes: Any) -> dict[str, Any]:
    """Runs the benchmark ``name`` of :data:`BENCHMARKS`, prints a table or one JSON object, and returns its values.

    ``sizes`` are the benchmark's own: ``seconds`` (of each comparison of steps), ``seeds`` (runs, or members of a
    population), ``tokens`` and ``vocab`` (of the loss), ``devices`` (the most, of the scaling), ``out`` (the document
    of the report).

    Raises:
      UserError: an unknown name, a size that the benchmark does not have, or whatever is wrong with the config.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    benchmark = BENCHMARKS[name]
    for size in sizes:
        if size not in (benchmark.__kwdefaults__ or {}):
            raise UserError(f"kdjax bench {name} takes no --{size}: leave it out.")
    with contextlib.redirect_stdout(sys.stderr):  # what the runs say, so that stdout holds the result alone
        found = benchmark(config, Path(workdir), **sizes)
    if json_output:
        print(json.dumps(found.values, indent=2, allow_nan=False))
    else:
        Console().print(found.table)
    return found.values


def _of(measure: Callable[[ConfigDict], dict[str, Any]], meaning: Mapping[str, str]) -> Callable[..., Found]:
    """A benchmark that has no sizes and leaves nothing in the workdir."""

    def benchmark(config: ConfigDict, workdir: Path) -> Found:
        values = measure(config)
        return Found(values, bench_step.table(values, meaning))

    return benchmark


def step(config: ConfigDict, workdir: Path, *, seconds: float = bench_step.SECONDS) -> Found:
    """The step, each of whose comparisons takes ``seconds``; see ``bench_step.measure``. Leaves nothing in
    ``workdir``."""
    values = bench_step.measure(config, seconds)
    return Found(values, bench_step.table(values, bench_step.MEANING))


def scaling(config: ConfigDict, workdir: Path, *, devices: int = bench_scaling.DEVICES) -> Found:
    """One device of up to ``devices``; see ``bench_scaling.measure``. Leaves nothing in ``workdir``."""
    values = bench_scaling.measure(config, devices)
    return Found(values, bench_scaling.table(values))


def variants(config: ConfigDict, workdir: Path, *, seconds: float = bench_variants.SECONDS) -> Found:
    """Other dtypes, stored teachers, teachers a batch ahead; see ``bench_variants.measure``. Leaves nothing in
    ``workdir``."""
    values = bench_variants.measure(config, seconds)
    return Found(values, bench_variants.table(values))


def report(config: ConfigDict, workdir: Path, *, out: str = bench_report.DOCUMENT) -> Found:
    """The tables of a document; see ``bench_report.measure``."""
    values = bench_report.measure(config, workdir, out)
    return Found(values, bench_report.table(values))


def loss(config: ConfigDict, workdir: Path, *, tokens: int = 4096, vocab: int = 32768) -> Found:
    """The loss over a large vocabulary; see ``bench_loss.measure``. Reads nothing of the config."""
    values = bench_loss.measure(tokens, vocab)
    return Found(values, bench_step.table(values, bench_loss.MEANING))


def population(config: ConfigDict, workdir: Path, *, seeds: int = bench_population.MEMBERS) -> Found:
    """``seeds`` students beside one teacher; see ``bench_population.measure``. Leaves nothing in ``workdir``."""
    values = bench_population.measure(config, seeds)
    return Found(values, bench_step.table(values, bench_population.MEANING))


def taps(config: ConfigDict, workdir: Path) -> Found:
    """What feature terms cost; see ``bench_taps.measure``. Leaves nothing in ``workdir``."""
    values = bench_taps.measure(config)
    return Found(values, bench_taps.table(values))


def compress(config: ConfigDict, workdir: Path, *, seeds: int = SEEDS) -> Found:
    """The steps of ``config.compress`` over several seeds; see ``bench_compress.measure``."""
    values = bench_compress.measure(config, workdir, seeds)
    _write(workdir / "compress_seeds.json", values)
    return Found(values, bench_compress.table(values))


# ------------------------------------------------------------------------------------------------------- several seeds


def seeds(config: ConfigDict, workdir: Path, *, seeds: int = SEEDS) -> Found:
    """All three arms for seeds 0 to ``seeds`` - 1, each in ``workdir/seed-i``, and what they say together.

    A finished seed is loaded and not trained again. The interval of distilled - alone is Student's t over the paired
    differences: both students of a seed share initial weights, data order and number of updates.
    """
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        found = distill.run(_with_seed(config, seed), workdir / f"seed-{seed}").results
        arms: dict[str, Any] = {name: found["arms"][name]["test"]["accuracy"] for name in (MAIN, *STUDENTS)}
        rows.append({"seed": seed, **arms, "difference": arms[DISTILLED] - arms[ALONE]})
    params = {name: found["arms"][name]["params"] for name in (MAIN, DISTILLED)}
    values = {
        "benchmark": "seeds",
        "config_sha256": configs.sha256(configs.resolve(config)),
        "seeds": rows,
        **{name: mean_and_sd([row[name] for row in rows]) for name in (MAIN, *STUDENTS)},
        "difference": mean_interval([row["difference"] for row in rows]),
        "share_of_teacher": mean_and_sd([row[DISTILLED] / row[MAIN] for row in rows]),
        "share_of_params": params[DISTILLED] / params[MAIN],
        "environment": results.environment(),
    }
    _write(workdir / "seeds.json", values)
    return Found(values, _seeds_table(values))


def _seeds_table(values: Mapping[str, Any]) -> Table:
    interval = values["difference"]["interval_95"]
    low_high = ", ".join(f"{100 * end:+.2f}" for end in interval) if interval else "none for one seed"
    caption = (
        f"distilled - alone, paired: 95 % interval [{low_high}] points; the distilled student has "
        f"{_percent(values['share_of_teacher'])} % of its teacher's accuracy and "
        f"{100 * values['share_of_params']:.1f} % of its parameters"
    )
    table = Table("seed", "teacher", "student alone", "student distilled", "distilled - alone", caption=caption)
    columns = (MAIN, ALONE, DISTILLED, "difference")
    for row in values["seeds"]:
        table.add_row(str(row["seed"]), *(f"{100 * row[name]:.2f}" for name in columns))
    table.add_section()
    table.add_row("mean ± sd", *(_percent(values[name]) for name in columns))
    return table


# ------------------------------------------------------------------------------------------------------ a class unseen


def omitted(config: ConfigDict, workdir: Path, *, seeds: int = SEEDS) -> Found:
    """How well a student knows a class of which it never saw an example, from soft targets alone.

    Hinton et al. 2015, section 3: the student is distilled at a high temperature on images without the class. It gives
    the class far too little, for want of examples, which one number mends: a bias added to the logit of that class,
    chosen for the accuracy on the training split (of which the student never saw that class). A config that omits no
    class is changed to omit class 3, with the term ``kl`` alone at temperature 20. Works in ``workdir/omitted-i``.
    """
    config = without_class(config)
    rows = [_omitted_once(_with_seed(config, seed), workdir / f"omitted-{seed}") for seed in range(seeds)]
    values = {
        "benchmark": "omitted",
        "config_sha256": configs.sha256(config),
        "omit_class": config.data.omit_class,
        "seeds": rows,
        **{
            when: {part: mean_and_sd([row[when][part] for row in rows]) for part in ("omitted", "all")}
            for when in ("teacher", "before", "after")
        },
        "environment": results.environment(),
    }
    _write(workdir / "omitted.json", values)
    return Found(values, _omitted_table(values))


def _omitted_once(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    experiment = build.prepare(config)
    experiments.refuse_language(experiment, "kdjax bench omitted")
    (train, test), omit = (experiment.dataset.train, experiment.dataset.test), config.data.omit_class
    if not (test.labels == omit).any():
        raise UserError(f"data.omit_class={omit} has no test example: nothing can be measured, so omit another class.")
    with distill.claimed(workdir, experiment.config):
        teachers = distill.obtain_teachers(experiment, workdir)
        student = distill.train_arm(experiment, DISTILLED, workdir, teachers=teachers)
    make_score = lambda model: classification.make_score(
        model, experiment.dataset, experiment.mesh, config.data.eval_batch_size
    )
    score, teacher_score = make_score(experiment.distilled), make_score(experiment.teachers[MAIN])
    bias = best_bias(score(student.variables, train), train.labels, omit)
    logits = score(student.variables, test)
    return {
        "seed": config.seed,
        "test_examples": int(np.sum(test.labels == omit)),
        "teacher": _accuracies(teacher_score(teachers[MAIN].variables, test), test.labels, omit),
        "before": _accuracies(logits, test.labels, omit),
        "bias": bias,
        "after": _accuracies(logits + bias * np.eye(logits.shape[-1])[[omit]], test.labels, omit),
    }


def without_class(config: ConfigDict) -> ConfigDict:
    """The config itself if it omits a class; else one without class 3 that learns from soft targets alone at T = 20."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    if changed.data.omit_class == -1:
        changed.data.omit_class = OMITTED_CLASS
        changed.stages = {}
        for term in changed.losses.values():
            term.weight = 0.0
        changed.losses.kl.update(weight=1.0, temperature=OMITTED_TEMPERATURE)
        changed.data.augment.crop_padding = 0  # as in the paper, whose transfer set was not shifted
    return configs.resolve(changed)


def best_bias(logits: NDArray[Any], labels: NDArray[Any], chosen: int) -> float:
    """The number to add to one class's logits that makes the most of the predictions right.

    Args:
      logits: [examples, classes].
      labels: [examples], -1 (unlabelled) is left out.
      chosen: the class whose logits it is for.

    Returns:
      The middle of the widest stretch of equally good values.

    Raises:
      UserError: the class, or all others, are missing from the labels: nothing bounds the number.
    """
    logits, labels = logits[labels >= 0].astype(np.float64), labels[labels >= 0]
    is_chosen = labels == chosen
    if not is_chosen.any() or is_chosen.all():
        raise UserError(f"a bias for class {chosen} needs labelled training examples of that class and of others.")
    others = np.where(np.arange(logits.shape[1])[None] == chosen, -np.inf, logits)
    needed = others.max(axis=1) - logits[:, chosen]  # an example is given to the class from this bias on
    # What each example adds to the number of right predictions as the bias passes by.
    gain = is_chosen.astype(int) - ((others.argmax(axis=1) == labels) & ~is_chosen)
    order = np.argsort(needed, kind="stable")
    edges = np.concatenate([[needed.min() - 1.0], needed[order], [needed.max() + 1.0]])
    right = np.concatenate([[0], np.cumsum(gain[order])])
    widths = np.diff(edges)
    best = np.flatnonzero(right == right[widths > 0].max())
    widest = best[np.argmax(widths[best])]
    return float(edges[widest] + widths[widest] / 2)


def _accuracies(logits: NDArray[Any], labels: NDArray[Any], chosen: int) -> dict[str, float]:
    right = logits.argmax(axis=-1) == labels
    return {"omitted": float(right[labels == chosen].mean()), "all": float(right[labels >= 0].mean())}


def _omitted_table(values: Mapping[str, Any]) -> Table:
    rows, stages = values["seeds"], ("teacher", "before", "after")
    caption = (
        f"accuracy on the {rows[0]['test_examples']} test examples of class {values['omit_class']}, which the student "
        "never saw, and on all; before and after one bias, chosen on the training split"
    )
    columns = [f"{stage}\n{part}" for stage in stages for part in ("class", "all")]
    table = Table("seed", *columns, "bias", caption=caption)
    for row in rows:
        cells = [f"{100 * row[stage][part]:.2f}" for stage in stages for part in ("omitted", "all")]
        table.add_row(str(row["seed"]), *cells, f"{row['bias']:+.2f}")
    table.add_section()
    table.add_row("mean ± sd", *(_percent(values[stage][part]) for stage in stages for part in ("omitted", "all")), "")
    return table


# -------------------------------------------------------------------------------------------------------------- shared


def _with_seed(config: ConfigDict, seed: int) -> ConfigDict:
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.seed = seed
    return changed


def _percent(found: Mapping[str, float | None]) -> str:
    sd = "" if found["sd"] is None else f" ± {100 * found['sd']:.2f}"
    return f"{100 * (found['mean'] or 0.0):.2f}{sd}"


def _write(path: Path, values: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(values, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --workdir.") from error


BENCHMARKS: dict[str, Callable[..., Found]] = {
    "step": step,
    "input": _of(bench_input.measure, bench_input.MEANING),
    "compile": _of(bench_compile.measure, bench_compile.MEANING),
    "resume": _of(bench_resume.measure, bench_resume.MEANING),
    "scaling": scaling,
    "variants": variants,
    "loss": loss,
    "signals": _of(bench_signals.measure, bench_signals.MEANING),
    "population": population,
    "taps": taps,
    "seeds": seeds,
    "omitted": omitted,
    "compress": compress,
    "report": report,
}
