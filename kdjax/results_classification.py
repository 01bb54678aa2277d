"""The part of ``results.json`` that is of classification runs: an arm's scores, the chain, and how they are told."""

import math
from collections.abc import Mapping
from typing import Any

from kdjax import memory
from kdjax import results as contract


def _headline(results: Mapping[str, Any]) -> str:
    arms = results["arms"]
    accuracy = {name: arm["test"]["accuracy"] for name, arm in arms.items()}
    if "student_distilled" not in arms:
        sentences = [
            f"The {contract.ARMS[name]} is right on {100 * value:.1f} % of the test set."
            for name, value in accuracy.items()
        ]
        return " ".join(sentences)
    distilled = accuracy["student_distilled"]
    facts = []
    if "student_alone" in arms:
        points = round(100 * (distilled - accuracy["student_alone"]), 1)
        apart = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if points else "level with"
        facts.append(f"is {apart} the same student alone")
    if accuracy.get("teacher"):
        kept = 100 * distilled / accuracy["teacher"]
        size = contract.share_text(arms["student_distilled"]["params"], arms["teacher"]["params"])
        facts.append(f"keeps {kept:.1f} % of the teacher's accuracy with {size} its parameters")
    return f"The distilled student {' and '.join(facts) or f'is right on {100 * distilled:.1f} % of the test set'}."


def _caveat(results: Mapping[str, Any], test_examples: int | None) -> str:
    arms = results["arms"]
    if not test_examples or not {"student_alone", "student_distilled"} <= set(arms):
        return ""
    alone, distilled = (arms[name]["test"]["accuracy"] for name in ("student_alone", "student_distilled"))
    noise = contract.noise_points([alone, distilled], test_examples)
    return (
        f"One seed, {test_examples:,} test examples: differences below about {noise:.1f} points "
        f"(two binomial standard errors) are noise{', as this one is' if 100 * abs(distilled - alone) < noise else ''}."
    )


# Key -> the highest value that it can have.
_TEST = {"accuracy": 1.0, "macro_f1": 1.0, "nll": math.inf, "ece": 1.0}
_LINK = {"test": _TEST, "fidelity": contract.FIDELITY}
_ARM = {**_LINK, "latency_ms": contract.LATENCY}


def _arm(path: str, arm: Any) -> None:
    counts = ("params", "weights_bytes", "steps")
    contract.check_keys(path, arm, {*counts, "examples_per_s", "params_sha256", *_ARM})
    contract.check_measured(path, arm, counts, _ARM)
    if arm["examples_per_s"] is not None:
        contract.check_number(f"{path}.examples_per_s", arm["examples_per_s"])
    contract.check_sha256(f"{path}.params_sha256", arm["params_sha256"])


def _chain(results: Mapping[str, Any]) -> None:
    chain = results.get("chain", [])
    if not isinstance(chain, list):
        raise contract.wrong("results.chain", "a list of links", chain)
    for number, link in enumerate(chain):
        _link(f"results.chain.{number}", link)


def _link(path: str, link: Any) -> None:
    counts = ("params", "steps")
    contract.check_keys(path, link, {"name", *counts, *_LINK})
    if not isinstance(link["name"], str):
        raise contract.wrong(f"{path}.name", "a string", link["name"])
    contract.check_measured(path, link, counts, _LINK)


KIND = contract.Kind(
    required=frozenset(),
    optional=frozenset({"task", "chain"}),
    check_arm=_arm,
    check_rest=_chain,
    headline=_headline,
    caveat=_caveat,
    columns={
        "parameters": lambda arm: f"{arm['params']:,}",
        "weights": lambda arm: memory.bytes_text(arm["weights_bytes"]),
        "accuracy %": lambda arm: f"{100 * arm['test']['accuracy']:.2f}",
        "macro F1": lambda arm: f"{arm['test']['macro_f1']:.4f}",
        "NLL (nats)": lambda arm: f"{arm['test']['nll']:.4f}",
        "ECE": lambda arm: f"{arm['test']['ece']:.4f}",
        "agrees with teacher %": lambda arm: f"{100 * arm['fidelity']['agreement']:.2f}",
        "KL(teacher ‖ arm) (nats)": lambda arm: f"{arm['fidelity']['kl']:.4f}",
        "latency p50 (ms)": lambda arm: f"{arm['latency_ms']['p50']:.3g}",
        "latency p99 (ms)": lambda arm: f"{arm['latency_ms']['p99']:.3g}",
        "updates": lambda arm: f"{arm['steps']:,}",
        "training examples/s": lambda arm: contract.speed_text(arm["examples_per_s"]),
    },
)
