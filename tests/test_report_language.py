import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from kdjax import report_language, results, results_language
from tests.test_report import Page, history_of

SHA = "1" * 64
PROMPT = "the License "


@pytest.fixture(scope="module")
def spoken():
    """Three real models of bytes: two bytes back (teacher), one back (alone), one back as the teacher would say it."""
    raw = np.frombuffer((Path(__file__).parents[1] / "LICENSE").read_bytes(), np.uint8)
    alphabet, text = np.unique(raw, return_inverse=True)
    size, half = len(alphabet), len(text) // 2
    seen, test = text[:half], text[half:]
    pairs, triples = np.zeros((size, size)), np.zeros((size, size, size))
    np.add.at(pairs, (seen[:-1], seen[1:]), 1)
    np.add.at(triples, (seen[:-2], seen[1:-1], seen[2:]), 1)
    share = lambda counts: counts / counts.sum(-1, keepdims=True)
    alone = share(pairs + 0.05)
    teacher = share(triples + 2 * alone)
    distilled = share(np.einsum("ij,ijk->jk", pairs + 0.01, teacher))
    models = {"student_distilled": distilled, "student_alone": alone, "teacher": teacher}
    of_test = lambda name: models[name][test[:-2], test[1:-1]] if name == "teacher" else models[name][test[1:-1]]
    target, said = test[2:], of_test("teacher")
    arms = {}
    for name, model in models.items():
        p = of_test(name)
        nll = -np.log(p[np.arange(len(target)), target]).mean()
        scores = {
            "nll": nll,
            "perplexity": math.exp(nll),
            "bits_per_byte": nll / math.log(2),
            "accuracy": (p.argmax(-1) == target).mean(),
            "tokens": len(target),
            "bytes": len(target),
            "agreement": (p.argmax(-1) == said.argmax(-1)).mean(),
            "kl": (said * np.log(said / p)).sum(-1).mean(),
        }
        rng, written = np.random.default_rng(0), list(np.searchsorted(alphabet, list(PROMPT.encode())))
        for _ in range(80):
            row = model[written[-2], written[-1]] if name == "teacher" else model[written[-1]]
            written.append(rng.choice(size, p=row))
        arms[name] = results_language.arm_result(
            variables={"params": {"p": model.astype(np.float32)}, "state": {}}, steps=200,
            examples_per_s=None if name == "teacher" else 100.0, tokens_per_example=64, scores=scores,
            latency_ms={"p50": 0.1, "p99": 0.2}, params_sha256=SHA,
            sample=bytes(alphabet[written[len(PROMPT) :]]).decode(),
        )  # fmt: skip
    signals = {"form": "top_k", "k": 8, "bytes_per_token": 48.0}
    return results.build(config_sha256=SHA, seed=0, arms=arms, task="language", prompt=PROMPT, signals=signals)


def write(tmp_path, found, **changes):
    config = {"task": "language", "seed": 0, "data": {"name": "license"}, "losses": {"kl": {"weight": 0.7}}}
    arguments = {"results": found, "config": config, "history": history_of(found["arms"])} | changes
    report_language.write(tmp_path / "report.html", **arguments)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def with_samples(found, samples):
    return {**found, "arms": {name: {**found["arms"][name], "sample": sample} for name, sample in samples.items()}}


def test_the_page_is_whole_and_asks_nothing_of_anybody(tmp_path, spoken):
    html = write(tmp_path, spoken)
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import", html)
    assert "default-src 'none'" in html
    assert len(html) < 500_000
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
    assert html == write(tmp_path, spoken)


def test_the_page_shows_what_was_measured(tmp_path, spoken):
    html = write(tmp_path, spoken)
    text = Page(html).text
    headings = ["Results", "Learning curves", "Text samples", "Fidelity to the teacher", "Cost", "Schedules as run"]
    assert re.findall(r"<h2>(.*?)</h2>", html) == [*headings, "Environment and config"]
    arms = spoken["arms"]
    bits = {name: arm["test"]["bits_per_byte"] for name, arm in arms.items()}
    assert bits["teacher"] < bits["student_alone"]
    assert results.headline(spoken) in text and results.caveat(spoken) in text
    for label, values in results.rows(spoken):
        assert label in text and all(value in text for value in values)
    gain = f"{bits['student_alone'] - bits['student_distilled']:+.3f}".replace("-", "−")
    assert f"Bits per byte {bits['student_distilled']:.3f} student distilled" in text
    assert f"Gain by distilling {gain} bits per byte" in text
    agreement = 100 * arms["student_distilled"]["fidelity"]["agreement"]
    assert f"Agreement {agreement:.1f} %" in text
    assert f"student distilled same first choice {agreement:.1f} % another {100 - agreement:.1f} %" in text
    for name in ("student_alone", "student_distilled"):
        assert f"{results.ARMS[name]} {arms[name]['fidelity']['kl']:.4f}" in text
    assert "Smaller" in text and "Latency of one window, median" in text and "Next-token accuracy" in text
    assert "Terms of the loss before their weights, student distilled" in text and "Temperature" in text
    tokens = arms["teacher"]["test"]["tokens"]
    assert f"{tokens:,} tokens that cover {tokens:,} bytes" in text
    assert "cache of the 8 most probable tokens at each position, 48.0 bytes per token" in text
    drawn = {**spoken, "signals": {"form": "sample", "samples": 50, "bytes_per_token": 40.04}}
    assert "cache of 50 draws" in write(tmp_path, drawn)
    assert "cache" not in write(tmp_path, {key: value for key, value in spoken.items() if key != "signals"})


def test_the_samples_stand_as_they_were_written(tmp_path, spoken):
    html = write(tmp_path, spoken)
    shown = re.findall(r'<pre class="sample"><span>(.*?)</span></pre>', html, re.DOTALL)
    assert shown[0] == PROMPT and len(shown) == 4
    written = [arm["sample"] for arm in spoken["arms"].values()]
    assert "\n" in "".join(written)  # the line breaks of the text itself
    assert [page_text.replace("&quot;", '"').replace("&#x27;", "'") for page_text in shown[1:]] == written


def test_text_from_outside_is_escaped(tmp_path, spoken):
    evil = "</span></pre><script>alert('1')</script><img src=http://x>"
    found = with_samples({**spoken, "prompt": evil}, dict.fromkeys(spoken["arms"], evil))
    html = write(tmp_path, found, config={"data": {"name": evil}})
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count(evil) >= 5


def test_what_cannot_be_shown_is_made_visible(tmp_path, spoken):
    samples = {
        "teacher": "\nnull \x00 bell \x07 del \x7f",
        "student_alone": "",
        "student_distilled": "half \ud800 a\u202eb",
    }
    found = with_samples({**spoken, "prompt": ""}, samples)
    html = write(tmp_path, found)
    assert "<span>\nnull &lt;U+0000&gt; bell &lt;U+0007&gt; del &lt;U+007F&gt;</span>" in html
    assert "half &lt;U+D800&gt; a&lt;U+202E&gt;b" in html
    assert "Empty: each began a text." in html and "Nothing: it ended the text at once." in html
    assert not re.search("[\x00-\x08\x7f\u202e]", html)


@pytest.mark.parametrize("text", ["naïve 语 नमस्ते\u200d\u00a0\u3000", "a\tb\nc", "👩\u200d🔬 e\u0301", "\ufffd <b>&"])
def test_text_of_any_script_stays_as_it_is(text):
    assert report_language.visible(text) == text


@pytest.mark.parametrize("names", [["teacher"], ["student_alone"], ["teacher", "student_distilled"]])
def test_a_run_with_fewer_arms_still_reports(tmp_path, spoken, names):
    fewer = {**spoken, "arms": {name: spoken["arms"][name] for name in names}}
    text = Page(write(tmp_path, fewer, history=[])).text
    assert results.headline(fewer) in text
    assert ("Fidelity" in text) == (len(names) == 2)
    assert "Learning curves" not in text and "Gain by distilling" not in text and "Text samples" in text
