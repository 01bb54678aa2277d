"""The configs of real language models: their sizes are the published ones, and their steps compile for 8 devices.

No weight is allocated: states and teachers are shapes with shardings, and what is looked at is the compiled program. It
is the CPU's, whose attention holds the scores of all pairs of tokens and whose products are float32, with float32
copies of the teacher's bfloat16 kernels. Its temporary bytes are therefore far above those of an accelerator.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kdjax import build, chunks, memory, train
from kdjax import config as configs
from kdjax.data.packing import TextSplit
from kdjax.data.text import TextDataset
from kdjax.data.tokenizers import Tokenizer
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED
from kdjax.model import flatten_paths, parameter_count
from kdjax.recipes import program

FOLDER = Path(__file__).parents[1] / "configs"
VARIANTS = {
    "lm_qwen25_7b_1_5b": ("", "top_k"),
    "lm_qwen25_1_5b_0_5b": ("", "fresh"),
    "lm_llama31_8b_1b": ("", "pruned"),
    "lm_qwen3_32b_8b": ("", "top_k"),
}
GB = 1e9


def qwen(kind: str, **sizes: Any) -> dict[str, Any]:
    common = {"architectures": [f"{kind}ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-06}
    return {**common, "rope_theta": 1000000.0, "use_sliding_window": False, "vocab_size": 151936, **sizes}


def llama(factor: float, **sizes: Any) -> dict[str, Any]:
    scaling = {"factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    return {
        **{"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
        **{"max_position_embeddings": 131072, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256},
        "rope_scaling": {**scaling, "original_max_position_embeddings": 8192},
        **sizes,
    }


# What the config.json of each model says of its sizes.
PUBLISHED = {
    "Qwen2.5-7B-Instruct": qwen(
        "Qwen2",
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": False},
        vocab_size=152064,
    ),
    "Qwen2.5-1.5B": qwen(
        "Qwen2",
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        **{"num_key_value_heads": 2, "max_position_embeddings": 131072, "tie_word_embeddings": True},
    ),
    "Qwen2.5-1.5B-Instruct": qwen(
        "Qwen2",
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
        **{"num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    ),
    "Qwen2.5-0.5B": qwen(
        "Qwen2",
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
        **{"num_key_value_heads": 2, "max_position_embeddings": 32768, "tie_word_embeddings": True},
    ),
    "Llama-3.1-8B-Instruct": llama(
        8.0, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, tie_word_embeddings=False
    ),
    "Llama-3.2-1B-Instruct": llama(
        32.0, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
    ),
    "Qwen3-32B": qwen(
        "Qwen3",
        **{"hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64},
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False},
    ),
    "Qwen3-8B-Base": qwen(
        "Qwen3",
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False},
    ),
}


class Case(NamedTuple):
    """A config, and what is known of it: ids of its tokenizer, published parameters in billions of teacher and
    student, and a bound of the CPU program's temporary bytes, about a tenth above what they are."""

    name: str
    tokens: int
    teacher: float
    student: float
    temp_gb: float


CASES = [
    Case("lm_qwen25_7b_1_5b", 151665, 7.62, 1.54, 26),
    Case("lm_llama31_8b_1b", 128256, 8.03, 1.24, 34),
    Case("lm_llama31_8b_1b:pruned", 128256, 8.03, 4.51, 39),
    Case("lm_qwen3_32b_8b", 151669, 32.8, 8.19, 52),
    Case("lm_qwen3_32b_8b:top_k", 151669, 32.8, 8.19, 52),
]
NAMES = [case.name for case in CASES]
FAMILIES = {"lm_qwen25_7b_1_5b": "Qwen2.5", "lm_llama31_8b_1b": "Llama", "lm_qwen3_32b_8b": "Qwen3"}


def config_of(name: str) -> Any:
    file, _, variant = name.partition(":")
    return configs.from_file(f"{FOLDER / file}.py:{variant}" if variant else f"{FOLDER / file}.py")


def numerals(tokens: int) -> dict[str, int]:
    """A vocabulary of so many tokens: the numbers."""
    return {str(number): number for number in range(tokens)}


def blank(tokens: int, context: int) -> TextDataset:
    """Two windows of one token, and a tokenizer of so many ids."""
    ones = np.ones((2, context + 1), np.uint16)
    split = TextSplit(np.zeros((2, context + 1), np.int32), ones, ones.astype(bool), ones)
    tokenizer = Tokenizer("blank", numerals(tokens), tokens, None, 0, lambda texts: [], lambda ids: "", "")
    return TextDataset("blank", split, split, tokenizer, context, "", "")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders of the models with nothing in them but their config.json and a tokenizer of as many tokens as theirs."""
    root = tmp_path_factory.mktemp("models")
    for name, content in PUBLISHED.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(content))
        tokens = next(case.tokens for case in CASES if name.startswith(FAMILIES[case.name.partition(":")[0]]))
        model = {"type": "WordLevel", "vocab": numerals(tokens), "unk_token": "0"}
        (root / name / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
        (root / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": "0"}))
    return root


def experiment_of(case: Case, models: Path) -> Any:
    """The experiment as a user starts it; refused where an option is not what the folder's config.json says."""
    config = config_of(case.name)
    words = [f"teacher.init={models / config.teacher.init}", "train.steps=100", "teacher.steps=100"]
    if config.student.init != "teacher":
        words.append(f"student.init={models / config.student.init}")
    # As many tokens in a chunk as an accelerator takes: a CPU's chunks are smaller.
    words.append(f"train.tokens_per_chunk={chunks.BUDGET_OF_ACCELERATORS // (4 * case.tokens)}")
    return build.prepare(configs.override(config, words), blank(case.tokens, config.data.context))


def abstract(experiment: Any) -> tuple[Any, Any, Any]:
    """The distilled student's arm, its state and its teachers' weights, in the dtype in which they are loaded."""
    arm = build.make_arm(experiment, DISTILLED)
    teachers = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
        program.abstract_teachers(experiment),
    )
    return arm, train.abstract_state(arm, experiment.mesh), teachers


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("file", VARIANTS)
def test_variants_resolve_and_differ(file):
    found = {
        variant: configs.resolve(config_of(f"{file}:{variant}" if variant else file)) for variant in VARIANTS[file]
    }
    assert len({configs.sha256(config) for config in found.values()}) == len(VARIANTS[file])
    with pytest.raises(UserError, match=VARIANTS[file][-1]):
        config_of(f"{file}:no_such_variant")


def test_every_language_config_of_a_real_model_is_here():
    assert {path.stem for path in FOLDER.glob("lm_*.py")} - {"lm_bytes"} == set(VARIANTS)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_sizes_are_the_published_ones_and_every_kernel_is_split_over_all_devices(case, models):
    experiment = experiment_of(case, models)
    _, state, teachers = abstract(experiment)
    assert parameter_count(teachers) == pytest.approx(case.teacher * 1e9, rel=0.01)
    assert parameter_count(state.params) == pytest.approx(case.student * 1e9, rel=0.01)
    # Weights and both moments: each device has its share, up to norms and biases, of which all have a copy.
    for tree in (teachers, state.params, state.opt_state):
        assert memory.per_device(tree) == pytest.approx(size(tree) / experiment.mesh.size, rel=0.001)
        for path, leaf in flatten_paths(tree).items():
            if "kernel" in path or "embedding" in path:
                assert memory.per_device(leaf) * experiment.mesh.size == size(leaf), path
            else:
                assert leaf.sharding.spec == PartitionSpec() and size(leaf) < 4e6, path


def test_the_pair_for_one_gpu_has_the_published_sizes(models):
    experiment = experiment_of(Case("lm_qwen25_1_5b_0_5b", 151665, 1.54, 0.494, 0), models)
    _, state, teachers = abstract(experiment)
    assert parameter_count(teachers) == pytest.approx(1.54e9, rel=0.01)
    assert parameter_count(state.params) == pytest.approx(0.494e9, rel=0.01)
    assert memory.per_device((teachers, state.params, state.opt_state)) < 10 * GB


def test_products_are_split_over_outputs_and_then_over_inputs(models):
    case = CASES[NAMES.index("lm_qwen3_32b_8b")]
    _, state, teachers = abstract(experiment_of(case, models))
    for tree in (state.params, teachers["teacher"]["params"]):
        specs = {path: leaf.sharding.spec for path, leaf in flatten_paths(tree).items()}
        for outputs in ("attention/q", "attention/k", "attention/v", "mlp/gate", "mlp/up"):
            assert specs[f"blocks/{outputs}/kernel"] == PartitionSpec(None, "fsdp", "tensor")
        for inputs in ("attention/o", "mlp/down"):
            assert specs[f"blocks/{inputs}/kernel"] == PartitionSpec(None, "tensor", "fsdp")
        assert specs["embed/embedding"] == specs["head/kernel"] == PartitionSpec("tensor", "fsdp")


# ------------------------------------------------------------------------------------------------ compiled programs

_OPERATION = re.compile(r"^\s*(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z-]+)\(", re.MULTILINE)
_SHAPE = re.compile(r"[a-z]+\d*\[([\d,]+)\]")


def shapes(text: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each operation of a compiled program, with the shape of each of its results on one device."""
    for result, operation in _OPERATION.findall(text):
        for dimensions in _SHAPE.findall(result):
            yield operation, tuple(int(number) for number in dimensions.split(","))


# The pruned student is a decoder like any other once it has begun.
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "lm_llama31_8b_1b:pruned"], ids=lambda c: c.name
)
def test_step_compiles_and_never_holds_the_logits_of_all_tokens(case, models, monkeypatch):
    experiment = experiment_of(case, models)
    config, mesh = experiment.config, experiment.mesh
    arm, state, teachers = abstract(experiment)
    monkeypatch.setattr(program, "abstract_teachers", lambda _: teachers)
    step = program.compile_stage(experiment, arm, arm.stages[0], config.data.batch_size)
    text = step.compiled.as_text()

    ways, tensor = mesh.shape["fsdp"], mesh.shape.get("tensor", 1)
    sequences = config.data.batch_size // (ways * config.train.accumulate)
    tokens = sequences * config.data.context
    scores = sequences * config.teacher.options.heads // tensor * config.data.context**2 * 4
    of_teacher, of_student, of_optimizer = map(memory.per_device, (teachers, state.params, state.opt_state))
    print(
        f"\n{case.name}, {tokens} tokens at a time on each of {mesh.size} devices: arguments "
        f"{step.argument_bytes / GB:.1f} GB (teacher {of_teacher / GB:.1f}, student {of_student / GB:.1f}, optimiser "
        f"{of_optimizer / GB:.1f}), outputs {step.output_bytes / GB:.1f} GB, temporaries {step.temp_bytes / GB:.1f} GB "
        f"(on CPU, where one copy of a layer's attention scores is {scores / GB:.1f} GB)"
    )
    assert step.argument_bytes == pytest.approx(of_teacher + of_student + of_optimizer, rel=0.01)
    assert step.output_bytes < 1e6  # the new state takes the place of the old one
    assert step.temp_bytes < case.temp_gb * GB

    tables = [leaf for path, leaf in flatten_paths((teachers, state.params)).items() if re.search("embed|head", path)]
    kernels = [leaf for path, leaf in flatten_paths((teachers, state.params)).items() if "blocks" in path]
    widths = {leaf.shape[1] for leaf in tables} | {leaf.shape[1] // ways for leaf in tables}
    rows = {case.tokens, *(leaf.shape[0] for leaf in tables)}
    vocabularies = {-(-count // parts) for count in rows for parts in (1, tensor)}
    # A layer's kernel in whole, or a hidden state of the tokens that are a device's own.
    largest = max(
        *(math.prod(leaf.shape[1:]) // tensor for leaf in kernels), tokens * max(leaf.shape[1] for leaf in tables)
    )
    of_tables = 0
    for operation, shape in shapes(text):
        gathers = operation.startswith(("all-gather", "all-reduce", "all-to-all", "collective", "reduce-scatter"))
        count = math.prod(shape)
        if vocabularies & {*shape}:
            others = count // max(shape)
            is_table = others in widths
            of_tables += is_table
            assert is_table or others <= config.train.tokens_per_chunk < tokens, (operation, shape)
            # Logits stay where they are made; their likeliest tokens alone are looked for in halves of a chunk's.
            assert is_table or not gathers or operation == "all-to-all", (operation, shape)
        elif gathers:
            assert count <= largest, (operation, shape)
    assert of_tables  # or the patterns above match nothing
