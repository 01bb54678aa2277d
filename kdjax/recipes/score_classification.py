"""The scores of a classification run: every arm on the whole test set, ``results.json`` and the report."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdjax import checkpoint, cluster, objective, report, results, sharding, weighting
from kdjax import experiment as experiments
from kdjax.experiment import DISTILLED, MAIN, STUDENTS, Experiment
from kdjax.model import Variables
from kdjax.recipes.arms import Outcome, Trained, whole
from kdjax.step import make_predict
from kdjax.tasks import classification
from kdjax.writers import read_jsonl


def run(experiment: Experiment, workdir: Path, done: dict[str, Trained]) -> Outcome:
    """Scores every arm on the whole test set, and writes ``results.json`` and ``report.html``."""
    config, dataset = experiment.config, experiment.dataset
    models = {name: experiments.model_of(experiment, name) for name in done}
    logits = {
        name: classification.make_score(models[name], dataset, experiment.mesh, config.data.eval_batch_size)(
            trained.variables, dataset.test
        )
        for name, trained in done.items()
    }
    teachers = {name: done[name] for name in experiment.teachers}
    reference = combined(experiment, {name: logits[name] for name in teachers})
    predictions = {MAIN: reference, **{name: logits[name] for name in STUDENTS}}
    arms = {}
    for name, trained in {MAIN: whole(teachers), **{name: done[name] for name in STUDENTS}}.items():
        members = {key: teachers[key].variables for key in teachers} if name == MAIN else {name: trained.variables}
        arms[name] = results.arm_result(
            variables=trained.variables,
            steps=trained.steps,
            examples_per_s=trained.examples_per_s,
            logits=predictions[name],
            teacher_logits=reference,
            labels=dataset.test.labels,
            latency_ms=_latency(experiment, models, members),
            params_sha256=checkpoint.digest(trained.variables),
        )
    chain = [
        results.link_result(
            name=name,
            variables=done[name].variables,
            steps=done[name].steps,
            logits=logits[name],
            teacher_logits=reference,
            labels=dataset.test.labels,
        )
        for name in experiment.links
        if name != DISTILLED
    ]
    found = results.build(config_sha256=experiment.config_sha256, seed=config.seed, arms=arms, chain=chain)
    if cluster.is_first():
        results.write(Path(workdir) / "results.json", found)
        report.write(
            Path(workdir) / "report.html",
            results=found,
            config=config.to_dict(),
            history=read_jsonl(Path(workdir) / "metrics.jsonl"),
            predictions=predictions,
            labels=dataset.test.labels,
            class_names=dataset.class_names,
        )
    return Outcome(found, len(dataset.test.labels))


def combined(experiment: Experiment, logits: dict[str, np.ndarray]) -> np.ndarray:
    """What several teachers say together, as the objective combines them at T = 1."""
    if len(logits) == 1:
        return logits[MAIN]
    how = experiment.config.teacher.combine
    weights: list[Any] = [experiments.member(experiment.config, name).weight for name in logits]
    if how == "routed":
        weights = list(weighting.routed_shares(len(logits), jnp.asarray(experiment.dataset.test.domain)))
    # Confidence is in the label, which nobody knows here: those teachers count as their weights say.
    together = objective.combine_teachers(
        [*map(jnp.asarray, logits.values())], weights, "logits" if how == "logits" else "probabilities"
    )
    return np.asarray(jax.device_get(together))


def _latency(experiment: Experiment, models: dict[str, Any], variables: dict[str, Variables]) -> dict[str, float]:
    """Milliseconds of one call with one example on one device; several teachers are run one after the other."""
    normalise = classification.make_normalise(experiment.dataset)
    device = jax.local_devices()[0]
    weights = jax.device_put(sharding.to_host(variables), device)
    predicts = {name: make_predict(models[name], normalise) for name in variables}
    together = jax.jit(lambda weights, inputs: [predicts[name](weights[name], {"inputs": inputs}) for name in predicts])
    example = jax.device_put(experiment.dataset.test.inputs[:1], device)
    return results.latency(lambda inputs: together(weights, inputs), example)
