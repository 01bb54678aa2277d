"""Checkpoints: exact, kept newest and best, and never silently wrong."""

import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdjax import checkpoint, sharding, state
from kdjax.checkpoint import Checkpoints, digest, load_model
from kdjax.errors import UserError
from kdjax.model import flatten_paths
from kdjax.state import inference_variables
from tests.helpers import equal_trees, small


@functools.cache
def make_state(seed=0, width=64, ema=False, axes=(("data", 1),)):
    mesh = sharding.make_mesh(dict(axes))
    create = lambda: state.create_state(small(width, norm=True), optax.adamw(1e-3), jax.random.key(seed), ema=ema)
    shardings = sharding.by_rules(jax.eval_shape(create), mesh, ((".*", "fsdp"),))
    return jax.jit(create, out_shardings=shardings)()


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save(folder, steps, ema=False, accuracies=(), **options):
    with Checkpoints(folder, **options) as checkpoints:
        for index, step in enumerate(steps):
            accuracy = accuracies[index] if accuracies else None
            checkpoints.save(step, make_state(step, ema=ema), {"note": step}, accuracy)


def restore(folder, like, said):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_newest(abstract(like), said.append)


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("ema", [False, True])
def test_round_trip_is_bit_for_bit_also_onto_another_mesh(tmp_path, ema):
    save(tmp_path, [3], ema=ema)
    for axes in ((("data", 1),), (("data", 2), ("fsdp", 4))):
        like = make_state(99, ema=ema, axes=axes)
        restored, meta = restore(tmp_path, like, [])
        assert equal_trees(restored, make_state(3, ema=ema))
        assert (meta["step"], meta["note"]) == (3, 3)
        assert restored.params["hidden"]["kernel"].sharding == like.params["hidden"]["kernel"].sharding


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
    """The step donates it, and overwrites it, while it is still being written."""
    overwrite = jax.jit(
        lambda state: jax.tree.map(lambda x: x + 1 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    current = jax.tree.map(jnp.copy, make_state(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, current, {}, None)
        for _ in range(20):
            current = overwrite(current)
    restored, _ = restore(tmp_path, make_state(99), [])
    assert equal_trees(restored, make_state(3))


@pytest.mark.parametrize(("limit", "in_background"), [(10**9, True), (10**3, False)])
def test_a_device_without_room_for_a_copy_is_waited_for(tmp_path, monkeypatch, limit, in_background):
    memory = {"bytes_limit": limit, "peak_bytes_in_use": 100}
    monkeypatch.setattr(checkpoint, "_stats", lambda tree: memory)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make_state(3), {}, None)
        assert (checkpoints._writing is not None) == in_background
    assert equal_trees(restore(tmp_path, make_state(99), [])[0], make_state(3))


def test_keeps_the_newest_and_the_best(tmp_path):
    save(tmp_path, [1, 2, 3, 4], accuracies=[0.5, 0.9, 0.7, 0.6], keep=1)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "4"]


def test_size_does_not_depend_on_anything_but_the_student(tmp_path):
    save(tmp_path, [1])
    stored = flatten_paths(make_state(1))
    assert biggest_file(tmp_path).stat().st_size < 3 * sum(x.size * 4 for x in stored.values() if hasattr(x, "nbytes"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "describe"])
def test_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save(tmp_path, [1, 2])
    file = biggest_file(tmp_path / "2" / "train")
    data = bytearray(file.read_bytes())
    if damage == "flip":
        # In the middle of the largest file lie array data; Orbax itself restores this without a word.
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "describe":
        (tmp_path / "2" / "_CHECKPOINT_METADATA").write_text("[]")
    else:
        file.unlink()
    said = []
    restored, meta = restore(tmp_path, make_state(), said)
    assert meta["step"] == 1
    assert equal_trees(restored, make_state(1))
    assert "damaged" in said[0]
    assert (tmp_path / "damaged-2").is_dir()  # set aside, not deleted


def test_every_flipped_bit_of_a_leaf_changes_its_checksum():
    from kdjax import checkpoint

    _checksums = checkpoint._checksums(None)
    leaf = np.arange(6, dtype=np.float32).reshape(2, 3)
    whole = int(_checksums(leaf))
    for byte in range(leaf.nbytes):
        for bit in range(8):
            raw = bytearray(leaf.tobytes())
            raw[byte] ^= 1 << bit
            assert int(_checksums(np.frombuffer(bytes(raw), np.float32).reshape(2, 3))) != whole
    assert int(_checksums(leaf[::-1])) != whole
    mesh = sharding.make_mesh({"data": 2})
    assert int(_checksums(jax.device_put(leaf, sharding.over_batch(mesh)))) == whole


def test_loading_the_model_alone(tmp_path):
    save(tmp_path, [1, 5], ema=True)
    expected = inference_variables(make_state(5, ema=True))
    variables, meta = load_model(tmp_path, abstract(expected))
    assert equal_trees(variables, expected)
    assert meta["step"] == 5


def test_loading_refuses_what_does_not_fit(tmp_path):
    like = abstract(inference_variables(make_state()))
    with pytest.raises(UserError, match="no checkpoint in"):
        load_model(tmp_path / "nowhere", like)
    save(tmp_path, [1])
    other = abstract(inference_variables(make_state(width=32)))
    with pytest.raises(UserError, match=r"another architecture: parameter params/head/kernel is \(64, 10\)"):
        load_model(tmp_path, other)
    file = biggest_file(tmp_path / "1" / "model")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_model(tmp_path, like)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root only")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_is_one_sentence_and_costs_no_earlier_checkpoint(small_disk):
    with pytest.raises(UserError, match="no space left on the disk; those saved before are kept"):
        save(small_disk, range(1, 20), keep=100)
    saved = max(int(path.name) for path in small_disk.iterdir() if path.name.isdigit())
    assert saved < 19
    restored, meta = restore(small_disk, make_state(), [])
    assert meta["step"] == saved
    assert equal_trees(restored, make_state(saved))


def test_digest_depends_on_every_value_name_and_type():
    base = {"a": jnp.arange(3.0), "b": jnp.zeros(2)}
    others = [
        {"a": jnp.asarray([0.0, 1.0, 2.0000002]), "b": base["b"]},
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"], "b": jnp.zeros(2, jnp.int32)},
    ]
    assert digest(base) == digest(jax.device_get(base))
    assert len({digest(tree) for tree in (base, *others)}) == 4
