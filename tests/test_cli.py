"""The command: bad input is one sentence and exit code 2, before training starts; help shows examples."""

import os
import re
import stat
import subprocess
import sys

import numpy as np
import pytest

from kdjax import cli
from kdjax.config import default, override, resolve
from kdjax.errors import UserError
from tests.helpers import tiny_config

TINY = (
    "--config.teacher.name=mlp",
    "--config.teacher.options={'hidden': (16,)}",
    "--config.student.name=mlp",
    "--config.student.options={'hidden': (8,)}",
    "--config.teacher.steps=3",
    "--config.train.steps=3",
    "--config.mesh.data=1",
)


def refused(capsys, *argv):
    """Runs the command, checks the manners of a refusal, and returns the sentence."""
    assert cli.run(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("kdjax: ")
    assert lines[0].endswith(".")
    assert "step" not in captured.out  # nothing was trained
    return lines[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.trian.steps=3", "unknown config key 'trian': did you mean 'train'"),
        ("--config.train.step=3", "did you mean 'train.steps'"),
        ("--config.train.steps=many", "config.train.steps is 'many' (str) and should be int"),
        ("--config.seed=1.5", "config.seed is 1.5 (float) and should be int"),
        ("--config.data.augment.flip=3", "config.data.augment.flip is 3 (int) and should be bool"),
        ("--config.losses.kl.weight", "has no value: write --config.losses.kl.weight=VALUE"),
        ("--config.student.name=cnnn", "unknown model 'cnnn': did you mean 'cnn'"),
        ("--config.student.options={'width': 3}", "option of model"),
        ("--config.losses.kll.weight=1", "unknown config key 'losses.kll': did you mean 'losses.kl'"),
        ("--config.losses.kl.temperature=0", "losses.kl.temperature is 0.0 and should be above 0"),
        ("--config.data.name=digit", "unknown data set 'digit': did you mean 'digits'"),
        ("--config.optimizer.name=adamm", "unknown optimizer 'adamm': did you mean 'adam'"),
        (
            "--config.optimizer.learning_rate={'schedule': 'cosin', 'init': 1.0}",
            "unknown schedule 'cosin': did you mean 'cosine'",
        ),
        ("--config.data.batch_size=100", "data.batch_size=100 is not divisible by the mesh's 8 devices: try 96"),
        ("--config.mesh.data=64", "needs 64 devices and there are 8"),
        ("--config.teacher.init=nowhere", "no checkpoint in"),
        ("--config.teacher.augment={'flop': True}", "unknown config key 'teacher.augment.flop': did you mean"),
        ("--config.train.dtype=float64", "unknown train.dtype 'float64'"),
        ("--config.data.omit_class=10", "data.omit_class=10 is not a class: there are 10"),
        ("--config.data.labels=1.5", "a share of labels is between 0 and 1"),
        ("--config.teacher.combine=median", "unknown way to combine teachers"),
        ("--config=configs/nothing.py", "configs/nothing.py"),
        ("--confg=1", "Unknown command line flag 'confg'"),
        ("--config.data.name=tfds:nothing_of_this_name", "tfds"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tmp_path, word, message):
    assert message in refused(capsys, "distill", "--workdir", str(tmp_path / "run"), word)


def test_unknown_verb_and_benchmark_and_missing_workdir(capsys, tmp_path):
    assert "unknown verb 'distil': did you mean 'distill'" in refused(capsys, "distil")
    assert "unknown benchmark 'steps': did you mean 'step'" in refused(capsys, "bench", "steps")
    assert "say which run" in refused(capsys, "evaluate")
    assert "is not a workdir of kdjax" in refused(capsys, "evaluate", "--workdir", str(tmp_path))
    assert "unknown arm 'student'" in refused(capsys, "train", "--arm", "student", "--workdir", str(tmp_path / "x"))
    assert "unexpected 'fast'" in refused(capsys, "distill", "fast")


def test_image_that_a_model_cannot_take(capsys, tmp_path):
    word = "--config.student.name=vit_ti", "--config.student.options={'patch': 3}"
    assert "patch" in refused(capsys, "distill", "--workdir", str(tmp_path / "run"), *word)


def test_config_file_that_raises(capsys, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config():\n    return 1 / 0\n")
    assert "ZeroDivisionError" in refused(capsys, "distill", f"--config={file}")


def test_workdir_of_another_config(capsys, tmp_path):
    workdir = str(tmp_path / "run")
    assert cli.run(["train", "--arm", "teacher", "--workdir", workdir, *TINY]) == 0
    capsys.readouterr()
    message = refused(capsys, "distill", "--workdir", workdir, *TINY, "--config.seed=1")
    assert "belongs to another config (it differs in seed)" in message
    message = refused(capsys, "evaluate", "--workdir", workdir)
    assert "student_alone" in message and "has no checkpoint" in message


def test_teacher_of_another_architecture_or_truncated(capsys, tmp_path):
    teacher = tmp_path / "teacher"
    assert cli.run(["train", "--arm", "teacher", "--workdir", str(teacher), *TINY]) == 0
    capsys.readouterr()
    other = (*TINY[:1], "--config.teacher.options={'hidden': (12,)}", *TINY[2:], f"--config.teacher.init={teacher}")
    message = refused(capsys, "distill", "--workdir", str(tmp_path / "a"), *other)
    assert re.search(r"another architecture: parameter \S+ is \(16,\)|parameter params/\S+ is", message)
    for file in (teacher / "checkpoints").rglob("*"):
        if file.is_file() and "model" in file.parts and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    message = refused(capsys, "distill", "--workdir", str(tmp_path / "b"), *TINY, f"--config.teacher.init={teacher}")
    assert "truncated or damaged" in message


def test_two_runs_in_one_workdir(capsys, tmp_path):
    from kdjax.recipes.distill import claimed

    with claimed(tmp_path, resolve(tiny_config())):
        assert "another run is in the workdir" in refused(capsys, "distill", "--workdir", str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_no_write_permission(capsys, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot write in the workdir" in refused(capsys, "distill", "--workdir", str(tmp_path / "run"))


def test_workdir_that_is_a_file(capsys, tmp_path):
    (tmp_path / "run").write_text("")
    assert "cannot write in the workdir" in refused(capsys, "distill", "--workdir", str(tmp_path / "run"))


def test_verbose_shows_the_traceback(capsys):
    assert cli.run(["distill", "--verbose", "--config.train.step=3"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_help_shows_an_example(capsys, verb):
    assert cli.run([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"kdjax {verb}" in text.split("Example:")[1]
    assert "--workdir" in text


def test_overview_names_every_verb(capsys):
    assert cli.run([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in cli.VERBS)


def test_overrides_take_numbers_schedules_and_open_options():
    config = override(
        default(),
        [
            "--config.optimizer.learning_rate=1e-3",
            "--config.losses.kl.temperature={'schedule': 'linear', 'init': 8.0, 'end': 1.0}",
            "--config.optimizer.clip_norm=1.0",
            "--config.student.name=mlp",
            "--config.student.options.hidden=(32,)",
            "--config.data.augment.flip=true",
        ],
    )
    resolve(config)
    assert config.optimizer.learning_rate == 1e-3
    assert config.losses.kl.temperature["end"] == 1.0
    assert config.student.options.hidden == (32,)
    assert config.data.augment.flip is True
    assert override(default(), ["--config.student.name=mlp"]).student.options.to_dict() == {}


def test_wrong_class_count_of_a_loaded_teacher(capsys, tmp_path):
    teacher = tmp_path / "teacher"
    synthetic = (
        "--config.data.name=synthetic",
        "--config.data.options={'shape': (8, 8, 1), 'classes': 4, 'examples': 64}",
    )
    assert cli.run(["train", "--arm", "teacher", "--workdir", str(teacher), *TINY, *synthetic]) == 0
    capsys.readouterr()
    message = refused(capsys, "distill", "--workdir", str(tmp_path / "a"), *TINY, f"--config.teacher.init={teacher}")
    assert "another architecture: parameter params/head/" in message


def test_import_costs_less_than_twice_jax_and_flax():
    """Counted in modules, since seconds depend on the machine."""
    count = "import sys; {}; print(len(sys.modules))"
    run = lambda code: int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )
    base = run(count.format("import jax, flax"))
    assert run(count.format("import kdjax, kdjax.losses; from kdjax import make_train_step")) < 2 * base
    names = ("tensorflow", "sklearn", "matplotlib", "orbax.checkpoint", "tensorflow_datasets", "torch")
    heavy = f"[m for m in {names} if m in sys.modules]"
    code = (
        f"import sys, kdjax, kdjax.losses; from kdjax import make_train_step; sys.exit(str({heavy}) if {heavy} else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0


def test_nan_in_data_is_refused(tmp_path):
    from kdjax import build
    from kdjax.data import sources
    from tests.helpers import digits

    inputs = digits().train.inputs.astype(np.float32)
    inputs[7, 2, 2] = np.nan
    broken = digits()._replace(train=sources.Split(inputs, digits().train.labels))
    with pytest.raises(UserError, match="7"):
        build.prepare(tiny_config(), broken)


def test_export_and_measure_say_what_they_take(capsys):
    asked = {
        "export": "say which run: kdjax export WORKDIR",
        "export runs/a --config.seed=1": "leave --config out",
        "export no/such/run": "no/such/run is not a workdir of kdjax",
        "measure": "there is nothing to measure",
        "measure a.onnx --config.data.data_dir=DATA": "give --config FILE",
        "measure no/such.onnx": "no/such.onnx",
    }
    for words, message in asked.items():
        assert cli.run(words.split()) == 2
        assert message in capsys.readouterr().err
