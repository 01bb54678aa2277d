"""The scores of a language-model run: every arm on the whole test split, a sample of its text, the report, and each
student as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kdjax import checkpoint, report_language, results, results_language
from kdjax import experiment as experiments
from kdjax.experiment import MAIN, STUDENTS, Experiment
from kdjax.model import logits_of
from kdjax.recipes.arms import Outcome, Trained, whole
from kdjax.tasks import language
from kdjax.writers import read_jsonl

LATENCY_CALLS = 20


def run(experiment: Experiment, workdir: Path, done: dict[str, Trained]) -> Outcome:
    """Scores every arm, and writes ``results.json``, ``report.html`` and ``huggingface/ARM``."""
    config, dataset = experiment.config, experiment.dataset
    teachers = {name: done[name].variables for name in experiment.teachers}
    members = {name: experiments.member(config, name).weight for name in teachers}
    arms = {}
    for name, trained in {MAIN: whole({key: done[key] for key in teachers}), **{k: done[k] for k in STUDENTS}}.items():
        of_teacher = name == MAIN
        model = experiments.model_of(experiment, name)
        # Several teachers are scored together as what they say; one of them writes the sample.
        variables = teachers[MAIN] if of_teacher else trained.variables
        evaluate = language.make_evaluate(
            None if of_teacher else model,
            dataset,
            experiment.mesh,
            config.data.eval_batch_size,
            teachers=experiment.teachers,
            weights=members,
            combine=config.teacher.combine,
            tokens_per_chunk=config.train.tokens_per_chunk,
        )
        settings = config.log.sample
        arms[name] = results_language.arm_result(
            variables=trained.variables,
            steps=trained.steps,
            examples_per_s=trained.examples_per_s,
            tokens_per_example=dataset.context,
            scores=evaluate(variables, teachers),
            latency_ms=_latency(experiment, model, variables),
            params_sha256=checkpoint.digest(trained.variables),
            sample=language.sample(
                model, variables, dataset, new_tokens=settings.tokens, temperature=settings.temperature
            ),
        )
    signals = None
    if experiment.signals:
        signals = language.describe_cache(experiment.signals)
    found = results.build(
        config_sha256=experiment.config_sha256,
        seed=config.seed,
        arms=arms,
        task="language",
        prompt=dataset.prompt,
        signals=signals,
    )
    if jax.process_index() == 0:
        results.write(Path(workdir) / "results.json", found)
        report_language.write(
            Path(workdir) / "report.html",
            results=found,
            config=config.to_dict(),
            history=read_jsonl(Path(workdir) / "metrics.jsonl"),
        )
    for name in STUDENTS:
        language.hand_over(config, dataset, done[name].variables, Path(workdir) / "huggingface" / name)
    return Outcome(found, int(arms[MAIN]["test"]["tokens"]))


def _latency(experiment: Experiment, model: Any, variables: Any) -> dict[str, float]:
    """Milliseconds of one window on one device, to the logits of its last token."""
    device = jax.local_devices()[0]
    weights = jax.device_put(jax.device_get(variables), device)

    @jax.jit
    def predict(weights: Any, tokens: Any) -> Any:
        outputs = model.apply(weights, {"tokens": tokens}, train=False)[0]
        return logits_of(outputs._replace(hidden=outputs.hidden[:, -1]))

    window = jax.device_put(jnp.asarray(experiment.dataset.test.tokens[:1, :-1], jnp.int32), device)
    return results.latency(lambda tokens: predict(weights, tokens), window, LATENCY_CALLS)
