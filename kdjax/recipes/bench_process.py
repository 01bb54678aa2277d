"""Measurements that need a process of their own: a cold compiler, another number of devices, a fresh start.

``python -m kdjax.recipes.bench_process NAME`` reads ``{"config", "options"}`` from its input and prints what it found
as its last line.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import kdjax
from kdjax import config as configs
from kdjax.errors import UserError

# Every program is kept, however small or quickly compiled.
KEEP_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def ask(name: str, config: ConfigDict, *, env: Mapping[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """What the measurement ``name`` of :func:`main` finds in a fresh process, which no cache of compiled programs helps
    but one that ``env`` names.

    Raises:
      UserError: the process failed; with the last line that it wrote.
    """
    paths = [str(Path(kdjax.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "kdjax.recipes.bench_process", name],
        input=json.dumps({"config": config.to_dict(), "options": options}),
        env={**ours, "PYTHONPATH": os.pathsep.join(paths), **(env or {})},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"the process that measures {name} failed: {said[-1].removeprefix('kdjax: ')}")
    return json.loads(done.stdout.splitlines()[-1])


def cached_in(folder: str) -> dict[str, str]:
    """The environment of a process that keeps its compiled programs in a folder."""
    return {"JAX_COMPILATION_CACHE_DIR": folder, **KEEP_ALL}


def fake_devices(count: int) -> dict[str, str]:
    """The environment of a process with that many CPU devices."""
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    flags = " ".join([*others, f"--xla_force_host_platform_device_count={count}"])
    # With a thread pool of fewer than two for each device, their collectives can wait for each other for ever.
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "NPROC": str(max(16, 2 * count))}


def main() -> None:
    """Runs the measurement that the command line names."""
    from kdjax.recipes import bench_compile, bench_resume, bench_scaling  # which ask this module

    measurements: dict[str, Any] = {
        "compile": bench_compile.compiled,
        "first_step": bench_resume.first_step,
        "scaling": bench_scaling.on_mesh,
    }
    asked = json.load(sys.stdin)
    config = configs.resolve(ConfigDict(asked["config"], type_safe=False))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found = measurements[sys.argv[1]](config, **asked["options"])
    except UserError as error:
        sys.exit(f"kdjax: {error}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
