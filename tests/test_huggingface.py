"""Hugging Face's format: the same logits and text as transformers, exact round trips, and files that are wrong."""

import json
import shutil
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kdjax import huggingface, sharding
from kdjax.errors import UserError
from kdjax.model import flatten_paths, logits_of
from kdjax.models.decoder import DecoderConfig, RopeScaling, make_decoder
from kdjax.models.generate import generate
from tests.helpers import equal_trees

torch = pytest.importorskip("torch", reason="transformers, the reference, runs on torch")
transformers = pytest.importorskip("transformers", reason="the reference")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="needs kdjax[text]")

SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3": ("Qwen3", dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen3 tied": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 80)).astype(np.int32)


def theirs(family):
    """A tiny random model of transformers, in which every parameter matters."""
    kind, options = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``(folder, model)`` of each family, made once."""
    made = {}

    def of(family):
        if family not in made:
            folder, model = tmp_path_factory.mktemp(family.replace(" ", "-")), theirs(family)
            model.save_pretrained(folder)
            made[family] = folder, model
        return made[family]

    return of


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a Qwen3 model's folder, to be damaged."""
    return shutil.copytree(saved("qwen3")[0], tmp_path / "copy")


def load(folder, **options):
    config = huggingface.read_config(folder)
    return config, huggingface.load(folder, config, **options)


def our_logits(config, variables, tokens):
    model = make_decoder(config)
    return np.asarray(jax.jit(lambda v, t: logits_of(model.apply(v, t, train=False)[0]))(variables, tokens))


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


def edit(folder, **changes):
    """Changes keys of config.json; ``None`` deletes one."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors_numpy.load_file(path)
    change(tensors)
    safetensors_numpy.save_file(tensors, path)


def over_devices(config):
    """Shardings over 8 devices that split stacked kernels along layers' outputs, tables along rows, and some not."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    specs = {2: PartitionSpec(None, "fsdp"), 3: PartitionSpec(None, "fsdp", "data")}
    shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))["params"]
    return jax.tree.map(lambda x: NamedSharding(mesh, specs.get(x.ndim, PartitionSpec())), shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(family, saved):
    folder, model = saved(family)
    config, variables = load(folder)
    wanted = their_logits(model, TOKENS)
    assert wanted.std() > 0.5
    np.testing.assert_allclose(our_logits(config, variables, TOKENS), wanted, atol=1e-4)
    prompt = TOKENS[:, :5]
    texts = generate(make_decoder(config), variables, prompt, new_tokens=24)
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    inputs = torch.tensor(prompt, dtype=torch.long)
    wanted = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    np.testing.assert_array_equal(texts, wanted.numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_loads_in_transformers_and_here_to_the_bit(family, saved, tmp_path):
    source, model = saved(family)
    config, variables = load(source)
    out = tmp_path / "out"
    huggingface.save(out, variables, config, eos=[7, 8], bos=3)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(again) is type(model)
    assert not any(report.values()), report
    assert again.dtype == torch.float32
    assert again.generation_config.eos_token_id == [7, 8]
    assert again.config.bos_token_id == 3
    np.testing.assert_array_equal(their_logits(again, TOKENS), their_logits(model, TOKENS))
    assert huggingface.read_config(out) == config
    assert equal_trees(huggingface.load(out, config), variables)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sharded_load_of_sharded_files_is_the_plain_one(saved, tmp_path):
    source, model = saved("qwen3")
    config, plain = load(source)
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    shardings = over_devices(config)
    spread = huggingface.load(tmp_path / "many", config, shardings=shardings)
    assert equal_trees(spread, plain)
    assert jax.tree.map(lambda x: x.sharding, spread["params"]) == shardings
    assert len(spread["params"]["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.devices()) == 1
    huggingface.save(tmp_path / "ours", spread, config, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert all(path.stat().st_size < 23_000 for path in (tmp_path / "ours").glob("*.safetensors"))
    assert equal_trees(huggingface.load(tmp_path / "ours", config), plain)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_array_equal(their_logits(again, TOKENS), their_logits(model, TOKENS))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_files(name, saved, tmp_path):
    source, _ = saved("qwen2")
    config, exact = load(source)
    half = theirs("qwen2").to(getattr(torch, name))
    half.save_pretrained(tmp_path / "theirs")
    assert huggingface.read_config(tmp_path / "theirs") == config
    kept = huggingface.load(tmp_path / "theirs", config, dtype=name)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(name)}
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(name), exact)
    assert equal_trees(kept, rounded)
    wide = huggingface.load(tmp_path / "theirs", config)
    assert equal_trees(wide, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    huggingface.save(tmp_path / "ours", wide, config, dtype=name)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert again.dtype == transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == getattr(torch, name)
    for parameter, wanted in zip(again.parameters(), half.parameters(), strict=True):
        assert torch.equal(parameter, wanted)


def test_loading_holds_no_second_copy_on_the_host(tmp_path):
    config = DecoderConfig(
        vocabulary=512, width=256, layers=8, heads=8, kv_heads=4, head_dim=32, mlp_width=512, context=64, tied=True
    )
    variables = make_decoder(config).init(jax.random.key(0))
    huggingface.save(tmp_path / "model", variables, config)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(variables)]
    assert sum(sizes) > 4 * max(sizes)
    load(tmp_path / "model")  # what is imported and cached on the way is not the model's
    shardings = over_devices(config)
    tracemalloc.start()
    try:
        loaded = huggingface.load(tmp_path / "model", config, shardings=shardings)
        # What is left is the arrays themselves, where JAX on CPUs took NumPy's memory as it was.
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert equal_trees(loaded, variables)
    assert left <= sum(sizes) + 2**20
    assert peak - left <= max(sizes) + 2**20


def test_padding_rows_of_the_vocabulary_come_along(folder):
    def pad(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = np.pad(tensors[name], ((0, 3), (0, 0)), constant_values=0.5)

    edit_tensors(folder, pad)
    edit(folder, vocab_size=64)
    config, variables = load(folder)
    assert config.vocabulary == 64
    assert np.all(np.asarray(variables["params"]["embed"]["embedding"])[61:] == 0.5)
    assert np.all(np.asarray(variables["params"]["head"]["kernel"])[61:] == 0.5)


# --- config.json


def test_both_layouts_of_the_rotary_settings(saved, folder):
    new = huggingface.read_config(saved("llama3")[0])
    assert new.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 32)
    assert new.rope_theta == 500.0
    data = json.loads((saved("llama3")[0] / "config.json").read_text())
    rope = data.pop("rope_parameters")
    old = data | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(old))
    assert huggingface.read_config(folder) == new
    old["rope_scaling"].pop("original_max_position_embeddings")  # then it is the longest sequence
    (folder / "config.json").write_text(json.dumps(old))
    assert huggingface.read_config(folder).rope_scaling.original_context == 128


def test_what_a_config_leaves_out_is_what_transformers_takes(saved, tmp_path):
    for family in ("llama2", "qwen2", "qwen3"):
        data = json.loads((saved(family)[0] / "config.json").read_text())
        for key in ("head_dim", "rope_parameters", "tie_word_embeddings", "rms_norm_eps", "hidden_act"):
            data.pop(key, None)
        (tmp_path / "config.json").write_text(json.dumps(data))
        wanted, found = transformers.AutoConfig.from_pretrained(tmp_path), huggingface.read_config(tmp_path)
        assert found.head_dim == getattr(wanted, "head_dim", wanted.hidden_size // wanted.num_attention_heads)
        assert found.rope_theta == wanted.rope_parameters["rope_theta"]
        assert (found.tied, found.norm_eps) == (wanted.tie_word_embeddings, wanted.rms_norm_eps)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "did you mean 'Qwen3ForCausalLM'.*LlamaForCausalLM, Qwen2For"),
        ({"architectures": []}, "names no architecture: it needs one of LlamaForCausalLM"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary scaling 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rotary scaling 'dynamic'"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "each kind of layer its own rotary"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ({"use_sliding_window": True}, "asks for use_sliding_window=true, which"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "asks for layer_types"),
        ({"attention_bias": True}, "asks for attention_bias=true"),
        ({"mlp_bias": True}, "asks for mlp_bias=true"),
        ({"hidden_act": "gelu"}, 'asks for hidden_act="gelu"'),
        ({"quantization_config": {"bits": 4}}, "choose the unquantised model"),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"hidden_size": "32"}, 'hidden_size="32": it must be a number'),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5: it must be a whole number"),
    ],
)
def test_a_config_that_would_be_computed_wrongly_is_refused(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        huggingface.read_config(folder)


def test_no_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        huggingface.read_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list"):
        huggingface.read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"cannot read .*config.json .No such file"):
        huggingface.read_config(folder)


# --- weights that are wrong


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(UP), rf"tensor {UP} \(48, 32\) is missing"),
        (drop("lm_head.weight"), r"tensor lm_head.weight \(61, 32\) is missing"),
        (put(UP, np.zeros((32, 48), np.float32)), rf"{UP} in .*safetensors is \(32, 48\) and should be \(48, 32\)"),
        (put(UP, np.zeros((48, 32), np.int8)), rf"{UP} in .*safetensors is I8 and should be one of"),
        (put("model.layers.3.mlp.up_proj.weight", np.zeros((48, 32), np.float32)), "layers.3.* is not part of"),
        (put("model.layers.0.self_attn.q_proj.bias", np.zeros(64, np.float32)), "q_proj.bias .* is not part of"),
    ],
)
def test_a_tensor_that_is_wrong_is_named(change, message, folder):
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        load(folder)


def test_tables_of_rotary_frequencies_are_ignored(folder):
    edit_tensors(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.zeros(8, np.float32)))
    load(folder)


def test_a_tied_model_may_hold_its_head_if_it_is_the_embedding(saved, folder):
    shutil.copytree(saved("qwen3 tied")[0], folder, dirs_exist_ok=True)
    table = safetensors_numpy.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(folder, put("lm_head.weight", table))
    config, variables = load(folder)
    assert config.tied
    assert "head" not in variables["params"]
    table[60, 31] += 1e-3
    edit_tensors(folder, put("lm_head.weight", table))
    with pytest.raises(UserError, match=r"lm_head.weight in .* differs from model.embed_tokens.weight"):
        load(folder)


def test_without_safetensors(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"run pip install 'kdjax\[text\]'"):
        load(folder)


def test_truncated_and_missing_files(saved, folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    for length in (len(whole) - 8, 200, 4, 0):
        (folder / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model.safetensors is truncated or damaged"):
            load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no .*safetensors in"):
        load(folder)

    saved("qwen3")[1].save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    shutil.copyfile(shards[0], shards[1])
    with pytest.raises(UserError, match=f"is not in .*{shards[1].name}, where model.safetensors.index.json"):
        load(tmp_path / "many")
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name}, which .* names, is missing"):
        load(tmp_path / "many")


# --- saving

OURS = DecoderConfig(
    vocabulary=30, width=24, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=20, context=16, qk_norm=True
)


def test_the_architecture_is_the_one_that_fits(tmp_path):
    assert huggingface.architecture_of(OURS) == "Qwen3ForCausalLM"
    assert huggingface.architecture_of(OURS._replace(qk_norm=False)) == "LlamaForCausalLM"
    assert huggingface.architecture_of(OURS._replace(qk_norm=False, qkv_bias=True)) == "Qwen2ForCausalLM"
    with pytest.raises(UserError, match=r"no architecture .* has qkv_bias=True with qk_norm=True"):
        huggingface.architecture_of(OURS._replace(qkv_bias=True))
    variables = make_decoder(OURS).init(jax.random.key(0))
    refused = {"LlamaForCausalLM": "save it as Qwen3", "Qwen4ForCausalLM": "did you mean 'Qwen3ForCausalLM'"}
    for architecture, message in refused.items():
        with pytest.raises(UserError, match=message):
            huggingface.save(tmp_path / "out", variables, OURS, architecture=architecture)
    odd = OURS._replace(qk_norm=False, width=25)
    with pytest.raises(UserError, match="width 25 and 2 heads"):
        huggingface.save(tmp_path / "out", make_decoder(odd).init(jax.random.key(0)), odd)
    assert not list(tmp_path.iterdir())


def test_heads_that_do_not_fill_the_width_load_in_transformers_in_every_family(tmp_path):
    for name in ("llama", "qwen2", "qwen3"):
        config = OURS._replace(qk_norm=name == "qwen3", qkv_bias=name == "qwen2")
        variables = make_decoder(config).init(jax.random.key(0))
        huggingface.save(tmp_path / name, variables, config)
        tokens = TOKENS[:, :16] % 30
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        np.testing.assert_allclose(our_logits(config, variables, tokens), their_logits(model, tokens), atol=1e-5)


def test_the_tokenizer_comes_along(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs kdjax[text]")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="b")
    fast.chat_template = "{{ messages[0].content }}"
    fast.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "model.safetensors").write_bytes(b"not copied")
    variables = make_decoder(OURS).init(jax.random.key(0))
    huggingface.save(tmp_path / "out", variables, OURS, tokenizer_folder=tmp_path / "tokenizer")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("b a c")["input_ids"] == [1, 0, 2]
    assert again.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a"
    with pytest.raises(UserError, match=r"no tokenizer in .*: it should have one of tokenizer.json"):
        huggingface.save(tmp_path / "other", variables, OURS, tokenizer_folder=tmp_path)


def test_a_save_is_whole_or_not_there(tmp_path):
    variables = make_decoder(OURS).init(jax.random.key(0))

    class Broken:
        shape = variables["params"]["norm"]["scale"].shape

        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    broken = {"params": variables["params"] | {"norm": {"scale": Broken()}}, "state": {}}
    with pytest.raises(KeyboardInterrupt):
        huggingface.save(tmp_path / "out", broken, OURS)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".out.partial").mkdir()  # of a process that was killed
    (tmp_path / ".out.partial" / "junk").touch()
    huggingface.save(tmp_path / "out", variables, OURS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    with pytest.raises(UserError, match="out is there already"):
        huggingface.save(tmp_path / "out", variables, OURS)
    with pytest.raises(UserError, match="cannot save the model to"):
        huggingface.save(tmp_path / "out" / "config.json" / "below", variables, OURS)


def test_what_cannot_be_saved(tmp_path):
    variables = make_decoder(OURS).init(jax.random.key(0))
    with pytest.raises(UserError, match="cannot save a model as int8: choose one of float32"):
        huggingface.save(tmp_path / "out", variables, OURS, dtype=jnp.int8)
    with pytest.raises(UserError, match=r"blocks/mlp/down/kernel is \(2, 20, 24\) and should be \(2, 21, 24\)"):
        huggingface.save(tmp_path / "out", variables, OURS._replace(mlp_width=21))
    with pytest.raises(UserError, match=r"parameter head/kernel is \(30, 24\) and should be absent"):
        huggingface.save(tmp_path / "out", variables, OURS._replace(tied=True))


def test_bfloat16_is_rounded_to_nearest(tmp_path):
    variables = make_decoder(OURS).init(jax.random.key(0))
    huggingface.save(tmp_path / "out", variables, OURS, dtype=ml_dtypes.bfloat16)
    loaded = flatten_paths(huggingface.load(tmp_path / "out", OURS))
    for path, leaf in flatten_paths(variables).items():
        np.testing.assert_array_equal(loaded[path], leaf.astype(jnp.bfloat16).astype(jnp.float32), path)
