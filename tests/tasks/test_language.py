"""Language modelling as a task: what is a target, what the scores are, and what is refused before anything runs."""

import itertools
import json
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from kdjax import build, sharding
from kdjax.data import pipeline, text
from kdjax.errors import UserError
from kdjax.model import logits_of
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.tasks import language
from tests.helpers import LETTERS, WORDS, decoder_folder, letters_config, letters_tokenizer, tiny_language_config

SIZES = DecoderConfig(vocabulary=33, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp_width=32, context=32)
DOCUMENTS = 21  # of the test split


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Whole documents of bytes, several in a window, with padding and prompts that are not in the loss."""
    folder = tmp_path_factory.mktemp("lines")
    rng = random.Random(0)
    words = lambda most: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))
    for name, count in (("train", 60), ("test", DOCUMENTS)):
        rows = [json.dumps({"prompt": words(2) + " ", "completion": words(3)}) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    data = {"name": f"jsonl:{folder}/train.jsonl", "options": {"test": f"{folder}/test.jsonl"}}
    return text.load({**data, "tokenizer": "bytes", "context": 70, "packing": "whole"})


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """The config of a text whose tokens are the letters of a ``tokenizer.json``, of 33 ids."""
    return letters_config(tmp_path_factory.mktemp("letters"))


def taught_by(letters, folder, part="teacher", **options):
    """That config with a model of a folder."""
    config = ConfigDict(letters.to_dict(), type_safe=False)
    config[part].init, config[part].options = str(folder), options
    return config


# ----------------------------------------------------------------------------------------------------- what is a target


def test_targets_inputs_and_positions_are_those_of_a_plain_loop(packed):
    batch = next(pipeline.eval_batches(packed.test, batch_size=len(packed.test.tokens) + 2))
    found = jax.jit(language.make_normalise(packed))(batch)
    windows, context = found["labels"].shape
    assert context == 70
    several = endings = 0
    for row in range(windows):
        start = 0
        for place in range(context):
            here, after = (int(batch["segments"][row, place + shift]) for shift in (0, 1))
            if place and here != int(batch["segments"][row, place - 1]):
                start = place
            label = -1
            if here == after != 0 and batch["in_loss"][row, place + 1] and batch["mask"][row]:
                label = int(batch["tokens"][row, place + 1])
            assert found["labels"][row, place] == label
            assert found["mask"][row, place] == (label >= 0)
            assert found["inputs"]["positions"][row, place] == place - start
            assert found["inputs"]["tokens"][row, place] == batch["tokens"][row, place]
            assert found["inputs"]["segments"][row, place] == found["segments"][row, place] == here
            assert found["bytes"][row, place] == batch["bytes"][row, place + 1]
            several, endings = max(several, here), endings + (label == packed.tokenizer.eos)
    assert several > 1 and endings == DOCUMENTS  # the token that ends each text is a target
    assert not np.asarray(found["mask"])[-2:].any()  # windows that fill up the last batch
    assert found["labels"].dtype == np.int32 and found["mask"].dtype == np.float32


def test_targets_of_a_prompt_are_none_and_those_of_all_windows_are_each_completion_once(packed):
    batch = next(pipeline.eval_batches(packed.test, batch_size=len(packed.test.tokens)))
    labels = np.asarray(language.make_normalise(packed)(batch)["labels"])
    file = Path(packed.name.removeprefix("jsonl:")).with_name("test.jsonl")
    rows = [json.loads(line) for line in file.read_text().split("\n")]
    wanted = sorted(bytes(row["completion"], "utf-8") for row in rows)
    found = []
    for row in labels:
        for is_target, run in itertools.groupby(row, lambda label: label >= 0):
            if is_target:
                found += bytes(x if x < 256 else 0xFF for x in run).rstrip(b"\xff").split(b"\xff")
    assert sorted(found) == wanted


def test_positions_begin_anew_in_each_segment():
    segments = jnp.array([[1, 1, 1, 2, 3, 3, 0, 0], [2, 2, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]])
    wanted = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert language.positions_of(segments).tolist() == wanted


# --------------------------------------------------------------------------------------------------------- the scores


def log_softmax64(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def models(packed):
    """A student and two teachers, sharp enough to be wrong and right, and the dense logits of each [n, t, v]."""
    made = {}
    for number, name in enumerate(("student", "teacher", "second")):
        model = make_decoder(SIZES._replace(vocabulary=257, width=16 + 8 * number, context=70))
        variables = jax.tree.map(lambda x: 2.0 * x, model.init(jax.random.key(number)))
        segments = jnp.asarray(packed.test.segments[:, :-1], jnp.int32)
        given = {"tokens": jnp.asarray(packed.test.tokens[:, :-1], jnp.int32), "segments": segments}
        made[name] = model, variables, np.asarray(logits_of(model.apply(variables, given, train=False)[0]))
    return made


def reference(packed, student, teacher=None):
    """The scores in NumPy, in float64, from dense logits; ``teacher``: log-probabilities [n, t, v]."""
    log_p, split = log_softmax64(student), packed.test
    chosen = text.target_mask(split)
    labels, log_p = split.tokens[:, 1:][chosen].astype(int), log_p[chosen]
    of_label = log_p[np.arange(len(labels)), labels]
    size = int(split.bytes[:, 1:][chosen].sum())
    found = {
        "nll": -of_label.mean(),
        "perplexity": np.exp(-of_label.mean()),
        "bits_per_byte": -of_label.sum() / np.log(2) / size,
        "accuracy": (log_p.argmax(-1) == labels).mean(),
        "tokens": len(labels),
        "bytes": size,
    }
    if teacher is not None:
        log_t = teacher[chosen]
        found["kl"] = (np.exp(log_t) * (log_t - log_p)).sum(-1).mean()
        found["agreement"] = (log_t.argmax(-1) == log_p.argmax(-1)).mean()
    return found


@pytest.mark.parametrize(("batch_size", "tokens_per_chunk", "devices"), [(4, 0, 1), (5, 14, 1), (8, 0, 8), (16, 5, 8)])
def test_scores_are_those_of_float64_whatever_the_batches_chunks_and_devices(
    packed, models, batch_size, tokens_per_chunk, devices
):
    assert len(packed.test.tokens) % batch_size  # the last batch is filled up
    (student, variables, logits), (teacher, taught, said) = models["student"], models["teacher"]
    evaluate = language.make_evaluate(
        student,
        packed,
        sharding.make_mesh({"data": devices}),
        batch_size,
        teachers={"teacher": teacher},
        tokens_per_chunk=tokens_per_chunk,
    )
    found = evaluate(variables, {"teacher": taught})
    wanted = reference(packed, logits, log_softmax64(said))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_several_teachers_are_one_by_their_weights(packed, models, combine):
    student, variables, logits = models["student"]
    names, shares = ("teacher", "second"), np.array([0.75, 0.25])
    said = [models[name][2].astype(np.float64) for name in names]
    if combine == "logits":
        mixed = log_softmax64(shares[0] * said[0] + shares[1] * said[1])
    else:
        mixed = np.log(sum(share * np.exp(log_softmax64(one)) for share, one in zip(shares, said, strict=True)))
    given = {
        "teachers": {name: models[name][0] for name in names},
        "weights": {"teacher": 3.0, "second": 1.0},
        "combine": combine,
    }
    taught = {name: models[name][1] for name in names}
    mesh = sharding.make_mesh({"data": 1})
    found = language.make_evaluate(student, packed, mesh, 8, **given)(variables, taught)
    wanted = reference(packed, logits, mixed)
    assert found == {name: pytest.approx(value, rel=2e-5) for name, value in wanted.items()}
    # What the teachers say together is scored as any model is: it agrees with itself.
    found = language.make_evaluate(None, packed, mesh, 8, **given)({}, taught)
    wanted = reference(packed, mixed, mixed)
    assert found == {name: pytest.approx(value, rel=2e-5, abs=1e-6) for name, value in wanted.items()}
    assert found["agreement"] == 1.0


def test_bits_per_byte_count_the_bytes_of_characters_of_several(letters):
    dataset = text.load(letters.data)
    model, variables = make_decoder(SIZES), make_decoder(SIZES).init(jax.random.key(0))
    found = language.make_evaluate(model, dataset, sharding.make_mesh({"data": 1}), 64)(variables)
    written = Path(letters.data.options.test).read_text()
    assert found["tokens"] == len(written)  # all but the first letter, and the end
    assert found["bytes"] == len(written.encode()) - 1 > 1.1 * len(written)
    assert found["bits_per_byte"] == pytest.approx(found["nll"] * found["tokens"] / np.log(2) / found["bytes"])


# --------------------------------------------------------------------------------------------------- the vocabulary


def test_tables_that_are_padded_differently_are_cut_to_the_tokens_that_are_shared(letters, tmp_path):
    folder, variables = decoder_folder(tmp_path / "teacher", Path(letters.data.tokenizer), vocabulary=40)
    config = taught_by(letters, folder)
    config.student.options = {**config.student.options, "vocabulary": 48}
    experiment = build.prepare(config)
    assert experiment.classes == experiment.dataset.tokenizer.size == 33
    tokens = {"tokens": jnp.asarray(experiment.dataset.test.tokens[:2, :-1], jnp.int32)}
    whole = np.asarray(logits_of(make_decoder(SIZES._replace(vocabulary=40)).apply(variables, tokens, train=False)[0]))
    (taught, student), kinds = (experiment.teachers["teacher"], experiment.student), []
    for model, weights in ((taught, variables), (student, student.init(jax.random.key(0)))):
        outputs = model.apply(weights, tokens, train=False)[0]
        kinds.append(logits_of(outputs))
        assert kinds[-1].shape == (2, 32, 33) and outputs.head.size == 33
    np.testing.assert_allclose(kinds[0], whole[..., :33], atol=1e-5)  # and so a softmax over the shared ones alone
    assert student.init(jax.random.key(0))["params"]["embed"]["embedding"].shape[0] == 48
    dense = log_softmax64(whole[..., :33])
    rows = np.asarray(experiment.dataset.test.tokens[:2, 1:], int)
    two = experiment.dataset.test._replace(**{k: v[:2] for k, v in experiment.dataset.test._asdict().items()})
    scores = language.make_evaluate(taught, experiment.dataset, experiment.mesh, 2)(variables, split=two)
    assert scores["nll"] == pytest.approx(-np.take_along_axis(dense, rows[..., None], -1).mean(), rel=1e-5)


def test_the_smaller_of_two_vocabularies_counts_where_the_larger_goes_on(letters, tmp_path):
    """The data's tokenizer has a token that the teacher does not know, and the text does not use it."""
    longer = letters_tokenizer(tmp_path / "longer", letters=LETTERS + ";")
    content = json.loads((longer / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 33, "content": "<more>"})
    (longer / "tokenizer.json").write_text(json.dumps(content))
    folder, _ = decoder_folder(tmp_path / "teacher", Path(letters.data.tokenizer))
    config = taught_by(letters, folder)
    config.data.tokenizer = str(longer)
    experiment = build.prepare(config)
    assert experiment.dataset.tokenizer.size == 34 and experiment.classes == 33
    (tmp_path / "train.txt").write_text("ab <more> " * 30)
    config.data.name = f"text:{tmp_path}/train.txt"
    with pytest.raises(UserError, match="the data has the token 33 and teacher and student share 33 tokens"):
        build.prepare(config)


def test_another_tokenizer_is_refused_by_its_first_difference(letters, tmp_path):
    swapped = LETTERS.replace("d", "#").replace("q", "d").replace("#", "q")
    other = letters_tokenizer(tmp_path / "other", letters=swapped + ";")
    for part in ("teacher", "student"):
        folder, _ = decoder_folder(tmp_path / part, other, vocabulary=40)
        config = taught_by(letters, folder, part)
        with pytest.raises(UserError, match=rf"{part}\.init=.*data\.tokenizer=.*id 3 is 'q' .*'d' ") as refused:
            build.prepare(config)
        assert str(refused.value).endswith(".") and "give both one tokenizer" in str(refused.value)


def test_a_folder_without_a_tokenizer_is_refused(letters, tmp_path):
    for part in ("teacher", "student"):
        folder, _ = decoder_folder(tmp_path / part, vocabulary=40)
        with pytest.raises(UserError, match=rf"{part}\.init=.* has no tokenizer\.json .*: copy its tokenizer there\."):
            build.prepare(taught_by(letters, folder, part))


# ------------------------------------------------------------------------------------------------- what is refused


def set_to(path, value):
    def change(config):
        *parents, last = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value

    return change


REFUSED = {
    "labels": (set_to("data.labels", 0.5), "data.labels.* for classification"),
    "teacher's labels": (set_to("teacher.labels", 0.5), "teacher.labels.* for classification"),
    "a class left out": (set_to("data.omit_class", 3), "omit_class.* for classification"),
    "a curriculum": (set_to("data.curriculum.pacing", "linear"), "curriculum.* for classification"),
    "routed teachers": (set_to("teacher.combine", "routed"), "routed.* for classification"),
    "a classifier to reuse": (set_to("student.reuse_classifier", True), "reuse_classifier.* for classification"),
    "another model": (set_to("student.name", "decodr"), "decodr.*decoder"),
    "an image model": (set_to("teacher.name", "cnn"), "cnn.*decoder"),
    "an unknown option": (set_to("student.options", {"widht": 16}), "widht.*width"),
    "an unknown remat": (set_to("student.options", {"remat": "al"}), "remat"),
    "too few rows": (set_to("student.options", {"vocabulary": 256}), "256 tokens cannot speak the 257"),
    "heads that do not fit": (set_to("student.options", {"heads": 3, "kv_heads": 2}), "heads"),
    "a wrong RoPE rule": (set_to("student.options", {"rope_scaling": {"factr": 8.0}}), "rope_scaling.*factr"),
    "too short positions": (set_to("student.options", {"context": 16}), "data.context=32 is longer than the 16"),
    "a class of images": (set_to("data.name", "digits"), "digits"),
    "a student's folder that is none": (set_to("student.init", "nowhere"), "student.init=nowhere"),
    "a teacher of itself": (set_to("teacher.init", "teacher"), "teacher"),
    "the past of each token": (set_to("losses.past_predictions.weight", 1.0), "past_predictions"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything_runs(what):
    change, message = REFUSED[what]
    config = tiny_language_config()
    change(config)
    with pytest.raises(UserError, match=message) as refused:
        build.prepare(config)
    assert str(refused.value).endswith(".") and "\n" not in str(refused.value)


def test_peers_are_refused_since_they_learn_from_logits_of_images():
    config = tiny_language_config()
    config.peers = {"other": {}}
    config.losses.mutual.weight = 1.0
    with pytest.raises(UserError, match=r"mutual|peers"):
        build.prepare(config)


def test_a_folder_says_its_own_sizes_and_reach(letters, tmp_path):
    folder, _ = decoder_folder(tmp_path / "model", Path(letters.data.tokenizer), context=48)
    config = taught_by(letters, folder, layers=1, remat="none")  # the same may be said
    config.data.context = 48
    assert build.prepare(config).dataset.context == 48
    config.data.context = 49
    with pytest.raises(UserError, match=r"data\.context=49 is longer than the 48"):
        build.prepare(config)
    with pytest.raises(UserError, match="has layers=1 and the config says 2"):
        build.prepare(taught_by(letters, folder, layers=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layers": 3}, "layers=3"), ({"heads": 4, "kv_heads": 4}, "heads"), ({"qk_norm": True}, "qk_norm")],
)
def test_a_student_that_is_no_part_of_its_teacher_is_refused_before_the_teacher_is_trained(options, message):
    config = tiny_language_config()
    config.student.init, config.student.options = "teacher", options
    with pytest.raises(UserError, match=message):
        build.prepare(config)


def test_a_student_of_its_teacher_takes_all_that_its_options_do_not_say():
    config = tiny_language_config()
    config.student.init, config.student.options = "teacher", {"layers": 1, "mlp_width": 16}
    dataset = language.load(config)
    whole, part = (language.decoder_config(config, one, dataset) for one in (config.teacher, config.student))
    assert part == whole._replace(layers=1, mlp_width=16)
