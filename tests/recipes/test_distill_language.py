"""Whole runs of language models: what they write, how they begin and resume, and that no layout changes them."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import advance, build, huggingface, results, sharding, train
from kdjax import experiment as experiments
from kdjax.compress import decoders
from kdjax.data import text, tokenizers
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, STUDENTS
from kdjax.model import logits_of
from kdjax.models.decoder import make_decoder
from kdjax.recipes import distill
from kdjax.recipes.arms import Trained
from kdjax.tasks import language
from tests.helpers import decoder_folder, equal_trees, letters_config, tiny_language_config

QUIET = lambda sentence: None
FEATURES = ("distilbert_cosine", "tinybert_hidden", "fitnets", "minilm", "minilmv2", "tinybert_attention")


def metrics_of(workdir, arm):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["arm"] == arm and "loss" in record]


def changed(config, **changes):
    """A copy of a config, such as with ``train__steps=2``."""
    config = ConfigDict(config.to_dict(), type_safe=False)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


def begun(config, teachers=None):
    """The parameters with which both students begin, and the experiment."""
    experiment = build.prepare(config)
    first = distill.first_weights(experiment, teachers or {})
    arms = [build.make_arm(experiment, name)._replace(first=first) for name in STUDENTS]
    alone, distilled = (train.fresh_state(arm, experiment.mesh).params for arm in arms)
    assert equal_trees(alone, distilled)
    assert not {x.unsafe_buffer_pointer() for x in jax.tree.leaves(alone)} & {
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(distilled)
    }  # each has its own, for a step donates what it is given
    return distilled, experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All three arms on bytes."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, distill.run(tiny_language_config(), workdir, say=QUIET).results


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """A config on 33 letters whose teacher is a folder of 40 rows, for two steps of plain gradient descent."""
    folder = tmp_path_factory.mktemp("letters")
    config = letters_config(folder)
    decoder_folder(folder / "teacher", folder / "tokenizer", vocabulary=40, layers=3, width=24, heads=3)
    config.teacher.init, config.teacher.options = str(folder / "teacher"), {}
    config.train.steps = 2
    config.optimizer.update(name="sgd", learning_rate=1.0)
    return config


# ------------------------------------------------------------------------------------------------------ what is written


def test_a_run_writes_all_that_it_promises(finished):
    workdir, found = finished
    results.validate(found)
    assert results.load(workdir / "results.json") == found
    assert found["task"] == "language" and "signals" not in found
    assert set(found["arms"]) == {"teacher", *STUDENTS}
    assert found["arms"]["teacher"]["fidelity"] == {"agreement": 1.0, "kl": 0.0}
    assert "bits per byte" in (workdir / "report.html").read_text()
    losses = {arm: [record["loss"] for record in metrics_of(workdir, arm)] for arm in found["arms"]}
    assert all(len(values) == 6 and values[-1] < values[0] for values in losses.values())


def test_the_first_loss_is_that_of_guessing(finished):
    for arm in ("teacher", *STUDENTS):
        assert metrics_of(finished[0], arm)[0]["ce"] == pytest.approx(math.log(257), rel=0.01)


def test_a_student_is_handed_over_as_transformers_reads_it(finished):
    torch = pytest.importorskip("torch", reason="transformers, the reference, runs on torch")
    transformers = pytest.importorskip("transformers", reason="the reference")
    workdir, found = finished
    experiment = build.prepare(tiny_language_config())
    dataset = experiment.dataset
    taught = distill.obtain_teachers(experiment, workdir, say=QUIET)
    for arm in STUDENTS:
        folder = workdir / "huggingface" / arm
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        tokens = dataset.test.tokens[:, :-1].astype(np.int64)  # one document: nothing is padded but the end
        with torch.no_grad():
            theirs = model(torch.tensor(tokens)).logits.double()
        teachers = taught if arm == DISTILLED else {}
        variables = distill.train_arm(experiment, arm, workdir, teachers=teachers, say=QUIET).variables
        given = {"tokens": jnp.asarray(tokens[:8], jnp.int32)}
        ours = logits_of(experiments.model_of(experiment, arm).apply(variables, given, train=False)[0])
        np.testing.assert_allclose(ours, theirs[:8].numpy(), atol=1e-4)
        # The scores of the run, computed anew from what was handed over.
        assert dataset.test.segments.max() == 1
        wanted = torch.tensor(text.target_mask(dataset.test))
        labels = torch.tensor(dataset.test.tokens[:, 1:].astype(np.int64))
        log_p = torch.log_softmax(theirs, -1)
        nll = -log_p.gather(-1, labels[..., None])[..., 0][wanted]
        scores = found["arms"][arm]["test"]
        assert scores["tokens"] == len(nll)
        assert scores["nll"] == pytest.approx(float(nll.mean()), rel=1e-5)
        assert scores["bits_per_byte"] == pytest.approx(float(nll.sum()) / math.log(2) / scores["bytes"], rel=1e-5)
        right = (log_p.argmax(-1) == labels)[wanted].double().mean()
        assert scores["accuracy"] == pytest.approx(float(right), abs=2e-4)
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    for written in ("def f(x):\n\treturn 1  # Grüße, 漢字 😀\r\n", "  ", "\x00\x7f"):
        ids = dataset.tokenizer.encode(written)[0].tolist()
        assert reader(written)["input_ids"] == ids == tokenizers.load(folder).encode(written)[0].tolist()
    assert reader.eos_token_id == model.generation_config.eos_token_id == dataset.tokenizer.eos


# ------------------------------------------------------------------------------------------------------- resuming


def test_a_finished_run_trains_nothing_and_changes_nothing(finished, monkeypatch):
    workdir, found = finished
    before = (workdir / "metrics.jsonl").read_bytes()

    def none(*_):
        raise AssertionError("a finished run has nothing to compile a step for")

    monkeypatch.setattr(advance, "compile_step", none)
    again = distill.run(tiny_language_config(), workdir, say=QUIET).results
    assert (workdir / "metrics.jsonl").read_bytes() == before
    unmeasured = lambda arm: {key: value for key, value in arm.items() if key != "latency_ms"}
    assert {k: unmeasured(v) for k, v in again["arms"].items()} == {k: unmeasured(v) for k, v in found["arms"].items()}


def test_a_run_that_was_cut_off_ends_with_the_same_weights(finished, tmp_path):
    workdir, found = finished
    copy = shutil.copytree(workdir, tmp_path / "cut")
    kept = copy / "checkpoints" / DISTILLED
    assert {child.name for child in kept.iterdir() if child.name.isdigit()} == {"4", "6"}
    shutil.rmtree(kept / "6")
    said = []
    again = distill.run_one(tiny_language_config(), copy, DISTILLED, say=said.append)
    assert any("resuming from step 4" in sentence for sentence in said)
    assert experiments.checkpoint.digest(again.variables) == found["arms"][DISTILLED]["params_sha256"]
    steps = [record["step"] for record in metrics_of(copy, DISTILLED)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert metrics_of(copy, DISTILLED)[-1]["loss"] == metrics_of(workdir, DISTILLED)[-1]["loss"]


# ------------------------------------------------------------------------------------------------- what they begin with


def test_students_begin_with_the_weights_of_a_folder_and_are_handed_over_as_they_came(letters, tmp_path):
    torch = pytest.importorskip("torch", reason="transformers, the reference, runs on torch")
    transformers = pytest.importorskip("transformers", reason="the reference")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=36, **sizes, **heads)).eval()
    model.save_pretrained(tmp_path / "student")
    shutil.copytree(letters.data.tokenizer, tmp_path / "student", dirs_exist_ok=True)
    config = changed(letters, student__init=str(tmp_path / "student"), student__options={})
    params, experiment = begun(config)
    folder = tmp_path / "student"
    assert equal_trees(params, huggingface.load(folder, huggingface.read_config(folder))["params"])
    np.testing.assert_array_equal(params["embed"]["embedding"], model.model.embed_tokens.weight.detach().numpy())
    theirs = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    language.hand_over(config, experiment.dataset, {"params": params, "state": {}}, tmp_path / "back")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ours = {name: tensor.detach().numpy() for name, tensor in back.state_dict().items()}
    assert ours.keys() == theirs.keys() and equal_trees(ours, theirs)
    # A folder of another model is refused by its first parameter that is of another shape.
    first = lambda: huggingface.load(letters.teacher.init, huggingface.read_config(letters.teacher.init))
    with pytest.raises(UserError, match="student_alone cannot begin with the weights that are given: parameter "):
        train.fresh_state(build.make_arm(experiment, ALONE)._replace(first=first), experiment.mesh)


def test_a_student_of_every_other_layer_begins_with_these_layers(letters):
    config = changed(letters, student__init="teacher", student__options={"layers": 2})
    experiment = build.prepare(config)
    teacher = experiments.load_teacher(experiment, "teacher")
    params, _ = begun(config, {"teacher": Trained(teacher, 0, None)})
    blocks = jax.tree.map(lambda x: x[jnp.array([0, 2])], teacher["params"]["blocks"])
    assert equal_trees(params, {**teacher["params"], "blocks": blocks})


def test_a_narrower_student_begins_with_channels_neurons_and_heads_of_its_teacher(letters):
    options = {"width": 16, "mlp_width": 20, "heads": 2, "kv_heads": 2}
    config = changed(letters, student__init="teacher", student__options=options)
    experiment = build.prepare(config)
    teacher = experiments.load_teacher(experiment, "teacher")
    params, _ = begun(config, {"teacher": Trained(teacher, 0, None)})
    whole = jax.tree.map(np.asarray, teacher["params"])
    place = lambda part, of: [next(i for i in range(len(of)) if np.array_equal(of[i], row)) for row in part]
    channels = place(np.asarray(params["embed"]["embedding"]).T, whole["embed"]["embedding"].T)
    assert channels == sorted(set(channels)) and len(channels) == 16
    np.testing.assert_array_equal(params["head"]["kernel"], whole["head"]["kernel"][:, channels])
    np.testing.assert_array_equal(params["norm"]["scale"], whole["norm"]["scale"][channels])
    for layer in range(3):
        up, theirs = (np.asarray(p["blocks"]["mlp"]["up"]["kernel"][layer]) for p in (params, whole))
        neurons = place(up.T, theirs[channels].T)
        assert neurons == sorted(set(neurons)) and len(neurons) == 20
        down, theirs = (np.asarray(p["blocks"]["mlp"]["down"]["kernel"][layer]) for p in (params, whole))
        np.testing.assert_array_equal(down, theirs[neurons][:, channels])
    split = experiment.dataset.train
    some = {"tokens": split.tokens[:16, :-1].astype(np.int32), "segments": split.segments[:16, :-1].astype(np.int32)}
    sizes = [language.decoder_config(config, part, experiment.dataset) for part in (config.teacher, config.student)]
    ranked = decoders.importance(sizes[0], teacher, some)
    assert channels == sorted(np.argsort(-ranked.channels, stable=True)[:16].tolist())


def test_a_teacher_kept_in_bfloat16_says_what_its_weights_say_in_either_dtype(letters, tmp_path):
    sizes = {"vocabulary": 40, "layers": 2}
    folder, variables = decoder_folder(tmp_path / "teacher", Path(letters.data.tokenizer), dtype=jnp.bfloat16, **sizes)
    tokens = {"tokens": jnp.arange(64, dtype=jnp.int32).reshape(2, 32) % 33}
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    wanted = logits_of(make_decoder(huggingface.read_config(folder)).apply(exact, tokens, train=False)[0])[..., :33]
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.1)):
        experiment = build.prepare(changed(letters, teacher__init=str(folder), train__dtype=dtype))
        loaded = experiments.load_teacher(experiment, "teacher")
        assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}
        assert equal_trees(loaded, jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), variables))
        said = logits_of(experiment.teachers["teacher"].apply(loaded, tokens, train=False)[0])
        assert said.dtype == jnp.float32
        np.testing.assert_allclose(said, wanted, atol=tolerance)


def test_a_run_in_bfloat16_keeps_the_students_parameters_in_float32(letters, tmp_path):
    done = distill.run_one(changed(letters, train__dtype="bfloat16"), tmp_path, DISTILLED, say=QUIET)
    assert {x.dtype for x in jax.tree.leaves(done.variables)} == {jnp.dtype("float32")}
    assert metrics_of(tmp_path, DISTILLED)[0]["ce"] == pytest.approx(math.log(33), rel=0.02)


# ------------------------------------------------------------------------------------------------ layouts of one batch


def test_parts_of_a_batch_give_the_same_weights_up_to_rounding(letters, tmp_path):
    runs = {parts: changed(letters, train__accumulate=parts, mesh__data=parts) for parts in (1, 2)}
    one, two = (distill.run_one(c, tmp_path / str(parts), DISTILLED, say=QUIET).variables for parts, c in runs.items())
    start, _ = begun(letters)
    apart = lambda a, b: float(np.abs(a - b).max())
    one, two = jax.device_get((one["params"], two["params"]))  # they lie on one device, and on two
    moved, rounded = jax.tree.map(apart, one, start), jax.tree.map(apart, one, two)
    assert all(jax.tree.leaves(jax.tree.map(lambda near, far: near < 0.01 * far, rounded, moved))), (rounded, moved)


def test_every_axis_of_the_mesh_gives_the_losses_of_one_device(tmp_path):
    config = tiny_language_config(steps=3, tokens_per_chunk=16)
    sizes = {"width": 64, "layers": 2, "heads": 4, "head_dim": 16, "mlp_width": 256}
    tokenizers.write_byte_tokenizer(tmp_path / "bytes")
    decoder_folder(tmp_path / "teacher", tmp_path / "bytes", vocabulary=260, **sizes)
    config.teacher.init, config.teacher.options = str(tmp_path / "teacher"), {}
    config.student.options = {**sizes, "layers": 1}
    for part in ("student", "teacher"):
        config.sharding[part] = sharding.DECODER
    losses = {}
    for name, axes in {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}.items():
        config.mesh = axes
        done = distill.run_one(config, tmp_path / name, DISTILLED, say=QUIET)
        losses[name] = [[r["loss"], r["ce"], r["kl"]] for r in metrics_of(tmp_path / name, DISTILLED)]
        shards = {x.sharding.spec for x in jax.tree.leaves(done.variables)}
    assert len(shards) > 1  # some of the parameters are split
    np.testing.assert_allclose(losses["eight"], losses["one"], rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ instructions


def dialogues(folder, count):
    """Conversations of two turns, and pairs of a prompt and a completion; and how many tokens of each are targets."""
    targets = {"messages": 0, "pairs": 0}
    rows = {"messages": [], "pairs": []}
    for number in range(count):
        first, second = f"é{number}" * (number % 3 + 1), "yes" * (number % 5 + 1)
        asks = [("user", f"what is {number}?"), ("assistant", first), ("user", "sure?"), ("assistant", second)]
        rows["messages"].append({"messages": [{"role": role, "content": said} for role, said in asks]})
        # What the assistant says, the marker that ends each of its turns, and the token that ends the text.
        targets["messages"] += sum(len(said.encode()) + len("<|im_end|>") for said in (first, second)) + 1
        rows["pairs"].append({"prompt": f"what is {number}? ", "completion": first})
        targets["pairs"] += len(first.encode()) + 1
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return targets


@pytest.mark.parametrize("kind", ["messages", "pairs"])
def test_only_what_the_assistant_says_is_in_the_loss(tmp_path, kind):
    targets = dialogues(tmp_path, 16)[kind]
    shutil.copy(tmp_path / f"{kind}.jsonl", tmp_path / "test.jsonl")
    config = tiny_language_config(steps=1)
    config.data.update(name=f"jsonl:{tmp_path}/{kind}.jsonl", context=255, packing="whole", eval_batch_size=8)
    config.data.options = {"test": f"{tmp_path}/test.jsonl"}
    experiment = build.prepare(config)
    split = experiment.dataset.train
    arm = build.make_arm(experiment, ALONE)
    step, hparams = arm.stages[0].step, arm.stages[0].hparams
    state = train.fresh_state(arm, experiment.mesh)
    batch = {**split._asdict(), "id": np.arange(len(split.tokens)), "epoch": np.zeros(len(split.tokens), np.int32)}
    new, metrics = jax.jit(step)(state, {}, batch, hparams)
    assert metrics["ce"][1] == metrics["accuracy"][1] == targets == text.targets(split)
    variables = {"params": state.params, "state": {}}
    logits = logits_of(experiment.student.apply(variables, inputs_of(split), train=False)[0])
    log_p = np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32), -1), np.float64)
    chosen = text.target_mask(split)
    labels = split.tokens[:, 1:][chosen].astype(int)
    assert metrics["ce"][0] == pytest.approx(-log_p[chosen][np.arange(len(labels)), labels].sum(), rel=1e-5)
    evaluate = language.make_evaluate(experiment.student, experiment.dataset, experiment.mesh, 8)
    assert evaluate({"params": new.params, "state": {}})["tokens"] == targets


def inputs_of(split):
    given = {name: jnp.asarray(split._asdict()[name][:, :-1], jnp.int32) for name in ("tokens", "segments")}
    return given | {"positions": language.positions_of(given["segments"])}


# --------------------------------------------------------------------------------------------------- other losses


def test_features_and_attention_of_decoders_are_compared_and_alike_where_the_models_are(letters, tmp_path):
    config = changed(letters, student__init=letters.teacher.init, student__options={}, train__steps=2)
    config.losses.kl.weight = 0.5
    for name in FEATURES:
        config.losses[name].weight = 0.1
    config.losses.fitnets.projector = "none"
    distill.run_one(config, tmp_path / "alike", DISTILLED, say=QUIET)
    alike = metrics_of(tmp_path / "alike", DISTILLED)[0]
    zeros = {"kl", *FEATURES} - {"tinybert_hidden"}  # which always learns a map
    assert {name: alike[name] for name in zeros} == dict.fromkeys(zeros, pytest.approx(0.0, abs=2e-6))
    assert alike["tinybert_hidden"] > 1e-3

    config.student.init, config.student.options = "", {"width": 24, "layers": 2, "heads": 3, "mlp_width": 32}
    distill.run_one(config, tmp_path / "apart", DISTILLED, say=QUIET)
    for record in metrics_of(tmp_path / "apart", DISTILLED):
        assert all(record[name] > 1e-4 for name in ("kl", *FEATURES)), record


def test_several_teachers_teach_and_are_scored_together(letters, tmp_path):
    other, _ = decoder_folder(tmp_path / "other", Path(letters.data.tokenizer), seed=5, vocabulary=36)
    config = changed(letters, train__steps=1)
    config.more_teachers = {"another": {"init": str(other), "options": {}, "weight": 3.0}}
    found = distill.run(config, tmp_path / "run", say=QUIET).results["arms"]
    assert found["teacher"]["fidelity"]["agreement"] == 1.0
    assert found["teacher"]["fidelity"]["kl"] == pytest.approx(0.0, abs=1e-6)
    experiment = build.prepare(config)
    taught = {name: experiments.load_teacher(experiment, name) for name in experiment.teachers}
    assert found["teacher"]["params"] == sum(x.size for x in jax.tree.leaves(taught))
    start, _ = begun(config)
    batch = next(build.make_arm(experiment, DISTILLED).batches(0))
    batch = language.make_normalise(experiment.dataset)(batch)
    said = lambda model, weights: np.asarray(
        jax.nn.log_softmax(logits_of(model.apply(weights, batch["inputs"], train=False)[0])), np.float64
    )
    log_q = said(experiment.student, {"params": start, "state": {}})
    each = [np.exp(said(experiment.teachers[name], taught[name])) for name in ("teacher", "another")]
    p = (each[0] + 3 * each[1]) / 4
    kl = (p * (np.log(p) - log_q)).sum(-1)[np.asarray(batch["mask"]) > 0].mean()
    assert metrics_of(tmp_path / "run", DISTILLED)[0]["kl"] == pytest.approx(kl, rel=1e-4)
