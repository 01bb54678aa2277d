"""What comes from outside runs nothing, leaves no folder, and is shown as text (docs/security.md)."""

import ast
import contextlib
import io
import json
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kdjax import config as configs
from kdjax import report, report_language, results
from kdjax.compress import report as compression
from kdjax.data import cache, chat, sources, tokenizers
from kdjax.errors import UserError
from kdjax.export import artefact, card
from kdjax.huggingface import load, read_config
from kdjax.huggingface.load import INDEX
from kdjax.measure import candidates, processes, runtimes
from kdjax.measure import report as measurement
from kdjax.untrusted import inside
from tests.helpers import decoder_folder, letters_tokenizer
from tests.test_fuzz import FILES, SCORE, SIZES, STEP

ROOT = Path(__file__).parents[1]
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)> [red]x[/red] \x1b]0;owned\x07\x1b[2J'


# ------------------------------------------------------------------------------------------------------- what is run

UNPICKLERS = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "pandas"}
RUNNERS = {"eval", "exec", "compile", "__import__"}
LOADERS = {("torch", "load"), ("torch", "export"), ("runpy", "run_path"), ("runpy", "run_module"), ("os", "system")}
ALLOWED = {("kdjax/config.py", ("runpy", "run_path"))}  # a config is Python by convention


def calls(tree):
    """Every call in a module, with the names of what is called, such as ("np", "load")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            names, inner = [], node.func
            while isinstance(inner, ast.Attribute):
                names, inner = [inner.attr, *names], inner.value
            yield node, ((inner.id, *names) if isinstance(inner, ast.Name) else ("?", *names))


def faults(path, text):
    """What in a module could run what a file holds."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from (f"imports {name}" for name in named if name.split(".")[0] in UNPICKLERS)
    for node, names in calls(tree):
        given = {word.arg: word.value for word in node.keywords}
        if names in {(name,) for name in RUNNERS} or (names[:2] in LOADERS and (path, names) not in ALLOWED):
            yield f"calls {'.'.join(names)}"
        pickles = given.get("allow_pickle")
        if pickles is not None and not (isinstance(pickles, ast.Constant) and pickles.value is False):
            yield "sets allow_pickle"
        shell = given.get("shell")
        if shell is not None or names[-1] in ("extractall", "unpack_archive"):
            yield f"calls {'.'.join(names)}, which files from elsewhere may lead anywhere"


def test_nothing_that_is_loaded_is_run():
    found = {}
    for path in sorted((ROOT / "kdjax").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if wrong := list(faults(name, path.read_text())):
            found[name] = wrong
    assert found == {}
    bad = "import pickle\nnp.load(f, allow_pickle=True)\ntorch.load(f)\neval(x)\nrun(x, shell=True)\nz.extractall(p)"
    assert len(list(faults("kdjax/x.py", bad))) == 6  # the check can fail


def test_an_array_file_with_objects_is_not_unpickled(tmp_path):
    from kdjax.recipes import difficulty

    np.savez(tmp_path / "scores.npz", teacher_sha256="a", examples=1, scores=np.array([{"a": 1}], object))
    assert difficulty._read(tmp_path / "scores.npz", "a", 1) is None


def test_a_torchscript_file_may_not_open_files(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    sprung = tmp_path / "sprung"

    code = f"def forward(self,\n    x: Tensor) -> Tensor:\n  torch.save(x, {str(sprung)!r})\n  return x\n"
    torch.jit.trace(torch.nn.Identity(), torch.zeros(1)).save(tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("code/__torch__/torch/nn/modules/linear.py"):
                begin = content.index(b"  def forward")
                content = content[:begin] + b"  " + code.replace("\n", "\n  ").encode()
            bad.writestr(name, content)
    with pytest.raises(UserError, match="calls 'save', which no model needs"):
        runtimes.open_model(tmp_path / "bad.pt", "torch")
    assert not sprung.exists()
    assert runtimes.open_model(tmp_path / "good.pt", "torch").call(np.ones(1, np.float32)) == 1


def test_what_torch_export_saves_is_refused(tmp_path):
    (tmp_path / "net.pt2").write_bytes(b"")
    with pytest.raises(UserError, match=r"no kind of model file.*torch\.export\.save"):
        candidates.read([str(tmp_path / "net.pt2")])


def test_a_serialised_program_calls_nothing_of_the_process(tmp_path):
    check = jax.export.DisabledSafetyCheck.custom_call("somewhere")
    like = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 2"), jnp.float32)
    for name, function in (("good", jnp.sin), ("bad", lambda x: jax.ffi.ffi_call("somewhere", x)(x))):
        exported = jax.export.export(jax.jit(function), disabled_checks=[check])(like)

        def fill(folder, exported=exported):
            (folder / "model").write_bytes(exported.serialize())
            about = {"format": "stablehlo", "runtime": "jax", "model": "model", "arm": "a", "params": 1}
            about |= {"weights_bytes": 4, "file_bytes": 9, "data": {}}
            return dict.fromkeys(artefact.KEYS) | about

        artefact.write(tmp_path / name, fill)
    assert candidates.read([str(tmp_path / "good")])[0].runtime == "jax"
    with pytest.raises(UserError, match="calls 'somewhere', which is no StableHLO"):
        candidates.read([str(tmp_path / "bad")])


def test_a_worker_does_not_run_modules_that_lie_beside_the_models(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with processes.started(["one"], None, 1) as (worker,), pytest.raises(UserError, match="unknown request"):
        processes.ask(worker, "nothing")
    assert not (tmp_path / "sprung").exists()


def test_tfds_neither_fetches_code_nor_imports_what_a_file_names(tmp_path):
    with pytest.raises(UserError, match="is no name of a data set"):
        sources.load({"name": "tfds:somebody:mnist", "data_dir": str(tmp_path)})
    with pytest.raises(UserError, match="is no name of a data set"):
        sources.load({"name": "tfds:../mnist", "data_dir": str(tmp_path)})
    folder = tmp_path / "mine" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"pythonClassName": "antigravity.Feature", "features": {}}))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "mine", "version": "1.0.0"}))
    with pytest.raises(UserError, match=r"asks for the class antigravity\.Feature to be run"):
        sources.load({"name": "tfds:mine", "data_dir": str(tmp_path)})


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 'a' * 10**12 }}", "{{ 9 ** 9999 }}", "{{ 1 / 0 }}",
     "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"],
)  # fmt: skip
def test_a_chat_template_is_in_a_sandbox(template):
    pytest.importorskip("jinja2", reason="the package jinja2 is not installed")
    tokenizer = tokenizers.load("bytes")._replace(chat_template=template)
    with pytest.raises(UserError, match="refuses a conversation"):
        chat.render([{"role": "user", "content": "a"}], tokenizer)


# ---------------------------------------------------------------------------------------------- where files are read


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/../../secret", "link", "", None, 7, "a\0b", "loop"])
def test_a_name_never_leaves_its_folder(tmp_path, name):
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "alias").symlink_to("sub")
    with pytest.raises(UserError):
        inside(folder, name)
    for good in ("sub/file", "alias", "..file"):
        assert inside(folder, good) == folder / good


def test_the_links_of_the_hubs_cache_are_followed_and_no_others(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "other.json").symlink_to("../../../abc")
    assert inside(snapshot, "config.json") == snapshot / "config.json"
    with pytest.raises(UserError, match="lies outside"):
        inside(snapshot, "other.json")


def test_every_reader_keeps_to_its_folder(tmp_path):
    pytest.importorskip("safetensors", reason="the package safetensors is not installed")
    secret = tmp_path / "secret"
    secret.write_text("{}")
    model, _ = decoder_folder(tmp_path / "model", letters_tokenizer(tmp_path / "tokenizer", "abc;"), vocabulary=4)
    sizes = read_config(model)
    (model / "model.safetensors").rename(tmp_path / "weights.safetensors")
    for name in ("../weights.safetensors", str(tmp_path / "weights.safetensors")):
        (model / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(UserError, match="lies outside"):
            load(model, sizes)
    (model / INDEX).unlink()
    (model / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="lies outside"):
        load(model, sizes)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        place = letters_tokenizer(tmp_path / f"of {file}", "abc;")
        (place / file).unlink(missing_ok=True)
        (place / file).symlink_to(secret)
        with pytest.raises(UserError, match="lies outside"):
            tokenizers.load(place)
        with pytest.raises(UserError, match="lies outside"):  # nor is what a link leads to handed over with a model
            decoder_folder(tmp_path / "copy", place, vocabulary=4)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "manifest.json").symlink_to(secret)
    with pytest.raises(UserError, match="lies outside"):
        cache.read_manifest(tmp_path / "cache")


def test_the_weights_of_an_onnx_file_lie_beside_it(tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    tensor = onnx.numpy_helper.from_array(np.ones(4, np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, "../secret", 0, 16)
    tensor.ClearField("raw_data")
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4])
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x")], [value("y")], [tensor])
    (tmp_path / "folder").mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 16)
    path = tmp_path / "folder" / "net.onnx"
    path.write_bytes(onnx.helper.make_model(graph, ir_version=10).SerializeToString())
    with pytest.raises(UserError, match="lies outside"):
        candidates.weigh(candidates.read([str(path)])[0])
    with pytest.raises(UserError, match="cannot be opened by onnxruntime"):  # onnxruntime sees to it itself
        runtimes.open_model(path, "onnxruntime")


@pytest.mark.parametrize("section", ["more_teachers", "assistants", "peers", "stages", "compress"])
def test_a_name_in_a_config_names_no_other_folder(section):
    config = configs.default()
    config[section] = {"/up": {"name": "mlp"}}
    with pytest.raises(UserError, match=r"take letters, digits, _ and -"):
        configs.resolve(config)


# --------------------------------------------------------------------------------------------------- how it is shown


class Page(HTMLParser):
    """What a page would run or fetch, and its text."""

    def __init__(self, text):
        super().__init__()
        self.active, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "img", "iframe", "object", "embed", "link", "base", "form", "a"):
            self.active.append(tag)
        for name, value in attrs:
            fetches = name in ("src", "href", "xlink:href", "action", "srcdoc") and not (value or "").startswith("#")
            if name.startswith("on") or fetches:
                self.active.append(f"{tag} {name}")

    def handle_data(self, data):
        self.text += data


CONFIG = {"data": {"name": EVIL}, "student": {"options": {EVIL: EVIL}}}
ENVIRONMENT = {**FILES["results"][1]["environment"], "cpu": EVIL, "device_kind": EVIL}


def classification_page(tmp_path):
    rng = np.random.default_rng(0)
    found = {**FILES["results"][1], "environment": ENVIRONMENT}
    found["arms"] = dict.fromkeys(results.ARMS, found["arms"]["teacher"])
    found["chain"] = [{**found["chain"][0], "name": EVIL}]
    history = [
        {"arm": arm, "step": step, "loss": 1.0, EVIL: 0.5, "hparams": {f"{EVIL}.weight": 1.0}}
        for arm in results.ARMS
        for step in (0, 1)
    ]
    report.write(
        tmp_path / "report.html", results=found, config=CONFIG, history=history, labels=np.arange(30) % 3,
        predictions={arm: rng.normal(size=(30, 3)) for arm in results.ARMS}, class_names=[EVIL, f"{EVIL}2", "$x"],
    )  # fmt: skip
    return tmp_path / "report.html"


def language_page(tmp_path):
    test = {"nll": 1.0, "bits_per_byte": 1.0, "perplexity": 2.0, "accuracy": 0.5, "tokens": 9, "bytes": 9}
    arm = {**FILES["results"][1]["arms"]["teacher"], "tokens_per_s": None, "test": test, "sample": EVIL}
    found = {**FILES["results"][1], "environment": ENVIRONMENT, "task": "language", "prompt": EVIL}
    del found["chain"]
    found["arms"] = dict.fromkeys(results.ARMS, arm)
    report_language.write(tmp_path / "language.html", results=found, config=CONFIG, history=[])
    return tmp_path / "language.html"


def measurement_of(names):
    document = json.loads(json.dumps(FILES["measure"][1]))
    model, ratios = document["models"]["a"], dict.fromkeys(measurement.contract.RATIOS, 1.5)
    document["models"] = {name: {**model, "path": EVIL, "format": EVIL, "ratios": ratios} for name in names}
    document["models"][names[0]]["ratios"] = None
    document["machine"]["spread"] = dict.fromkeys(names, 0.1)
    return {**document, "reference": names[0], "environment": ENVIRONMENT}


def measurement_page(tmp_path):
    measurement.write_report(tmp_path / "measure.html", measurement_of([EVIL, EVIL + "2"]))
    return tmp_path / "measure.html"


def compressed():
    score, step = {**SCORE, "extra": 1.0}, {**STEP, "name": EVIL, "method": EVIL, "spec": {EVIL: EVIL}}
    models = {"teacher": {"spec": {}, "score": score, **SIZES}}
    return {**FILES["compress"][1], "environment": ENVIRONMENT, "models": models, "steps": [step]}


def compression_page(tmp_path):
    compression.write_html(tmp_path / "compress.html", compressed(), CONFIG)
    return tmp_path / "compress.html"


def comparison_page(tmp_path):
    from kdjax.compare.report import write_report

    evil = "".join(filter(str.isprintable, EVIL))  # the contract refuses others
    document = json.loads(json.dumps({**FILES["compare"][1], "environment": ENVIRONMENT}))
    document["methods"][evil] = {**document["methods"].pop("b"), "losses": {EVIL: {EVIL: EVIL}}}
    document["methods"]["a"]["cells"][0]["accuracy"] = 0.4
    document["grid"]["keys"] = [evil]
    write_report(tmp_path / "compare.html", document)
    return tmp_path / "compare.html"


@pytest.mark.parametrize(
    "make", [classification_page, language_page, measurement_page, compression_page, comparison_page]
)
def test_a_page_shows_what_others_wrote_as_text(tmp_path, make):
    page = Page(make(tmp_path).read_text())
    assert page.active == []
    assert "<script>alert(1)</script>" in page.text


def test_the_card_of_a_model_shows_what_others_wrote_as_text():
    about = dict.fromkeys(artefact.KEYS) | {"format": "onnx", "arm": EVIL, "params": 1, "weights_bytes": 1}
    port = {"name": EVIL, "dtype": "f", "shape": [EVIL]}
    about |= {"file_bytes": 1, "input": port, "output": port, "task": "classification", "labels": [EVIL], "model": EVIL}
    facts = {
        "artefact": about, "model": {"name": EVIL, "options": {EVIL: EVIL}}, "results": None, "traces": [EVIL],
        "teachers": [{"name": EVIL, "model": EVIL, "init": EVIL, "licence": EVIL}], "compression": [],
        "data": {"name": EVIL, "train": 1, "test": 1, "licence": EVIL}, "versions": {EVIL: EVIL},
        "classes": [{"label": EVIL, "examples": 1, "accuracy": 0.5, "teacher": 0.5}],
    }  # fmt: skip
    text = card.markdown(card.make(facts))
    assert "\x1b" not in text and r"\<script\>" in text
    assert "<" not in text.replace(r"\<", "")
    assert "](" not in text.replace(r"\]\(", "")


def test_a_terminal_shows_what_others_wrote_as_text():
    run = {**FILES["results"][1], "chain": [{**FILES["results"][1]["chain"][0], "name": EVIL}]}
    run["arms"] = dict.fromkeys(results.ARMS, run["arms"]["teacher"])
    for table in (results.table(run), measurement.table(measurement_of([EVIL, "b"])), compression.table(compressed())):
        stream = io.StringIO()
        Console(file=stream, width=400, force_terminal=True, color_system=None).print(table)
        said = stream.getvalue()
        assert "[red]x[/red]" in said and "<U+001B>]0;owned<U+0007>" in said
        assert "\x1b]" not in said and "\x1b[2J" not in said and "\x07" not in said
    with contextlib.suppress(UserError):
        raise UserError(f"a file says {EVIL}\nand more.")
    assert str(UserError(EVIL + "\nmore")).isprintable()
