"""The scores of a language-model run: every arm on the whole test split, a sample of its text, the report, and each
student as a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kdjax import checkpoint, cluster, report_language, results, results_language, sharding, train
from kdjax import experiment as experiments
from kdjax.experiment import MAIN, STUDENTS, Experiment
from kdjax.model import Model, Variables, logits_of
from kdjax.recipes.arms import Outcome, Trained, whole
from kdjax.tasks import language
from kdjax.writers import read_jsonl

LATENCY_CALLS = 20


def run(experiment: Experiment, workdir: Path, done: dict[str, Trained]) -> Outcome:
    """Scores every arm, and writes ``results.json``, ``report.html`` and ``huggingface/ARM``."""
    config, dataset, workdir = experiment.config, experiment.dataset, Path(workdir)
    place = lambda rules, names: train.put_teachers({k: done[k].variables for k in names}, experiment.mesh, rules)
    teachers = place(config.sharding.teacher, experiment.teachers)
    students = place(config.sharding.student, STUDENTS)
    of_teachers = whole({name: done[name] for name in teachers})
    arms = {MAIN: _arm(experiment, MAIN, of_teachers, teachers[MAIN], teachers)}
    arms |= {name: _arm(experiment, name, done[name], students[name], teachers) for name in STUDENTS}
    found = results.build(
        config_sha256=experiment.config_sha256,
        seed=config.seed,
        arms=arms,
        task="language",
        prompt=dataset.prompt,
        signals=language.describe_cache(experiment.signals) if experiment.signals else None,
    )
    if cluster.is_first():
        history = read_jsonl(workdir / "metrics.jsonl")
        results.write(workdir / "results.json", found)
        report_language.write(workdir / "report.html", results=found, config=config.to_dict(), history=history)
    for name in STUDENTS:
        weights = sharding.to_host(done[name].variables)
        if cluster.is_first():
            language.hand_over(config, dataset, weights, workdir / "huggingface" / name)
    return Outcome(found, int(arms[MAIN]["test"]["tokens"]))


def _arm(
    experiment: Experiment, name: str, trained: Trained, placed: Variables, teachers: Mapping[str, Variables]
) -> dict[str, Any]:
    """An arm's entry of ``results.json``; several teachers are scored as what they say together, and the first of them
    writes the sample."""
    config, dataset, model = experiment.config, experiment.dataset, experiments.model_of(experiment, name)
    evaluate = language.make_evaluate(
        None if name == MAIN else model,
        dataset,
        experiment.mesh,
        config.data.eval_batch_size,
        teachers=experiment.teachers,
        weights={teacher: experiments.member(config, teacher).weight for teacher in teachers},
        combine=config.teacher.combine,
        tokens_per_chunk=config.train.tokens_per_chunk,
    )
    drawn = config.log.sample
    return results_language.arm_result(
        variables=trained.variables,
        steps=trained.steps,
        examples_per_s=trained.examples_per_s,
        tokens_per_example=dataset.context,
        scores=evaluate(placed, teachers),
        latency_ms=_latency(experiment, model, placed),
        params_sha256=checkpoint.digest(trained.variables),
        sample=language.sample(model, placed, dataset, new_tokens=drawn.tokens, temperature=drawn.temperature),
    )


def _latency(experiment: Experiment, model: Model, variables: Variables) -> dict[str, float]:
    """Milliseconds of one window, to the logits of its last token, with the weights where they lie."""

    @jax.jit
    def predict(weights: Variables, tokens: jax.Array) -> jax.Array:
        outputs = model.apply(weights, {"tokens": tokens}, train=False)[0]
        return logits_of(outputs._replace(hidden=outputs.hidden[:, -1]))

    tokens = experiment.dataset.test.tokens[:1, :-1].astype(np.int32)
    window = jax.device_put(tokens, sharding.replicated(experiment.mesh))
    return results.latency(lambda tokens: predict(variables, tokens), window, LATENCY_CALLS)
