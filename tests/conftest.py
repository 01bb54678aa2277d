"""Eight fake CPU devices for every test; set before JAX starts."""

import os

# Eight devices on few cores: with a smaller thread pool the collectives deadlock without a message.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import gc

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled():
    """Thousands of compiled programs make one process slow and large."""
    yield
    jax.clear_caches()
    gc.collect()
