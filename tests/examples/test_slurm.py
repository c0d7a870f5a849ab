"""examples/cluster/job.slurm and run.sh under pretended Slurm commands; a task has no scontrol, as in a container."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.distributed import free_environment

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "cluster" / "job.slurm"
QWEN = "examples/qwen3_moe/run.sh"  # for two nodes
# Of the batch shell: scontrol, srun, and a sleep that does not wait. Of a task: torchrun and python.
BATCH = {
    "scontrol": 'if [ "$1 $2" = "show hostnames" ]; then echo first; echo second; else . "$REQUEUE"; fi',
    "srun": """while [ "$1" != bash ]; do echo "srun $1"; shift; done
        for node in 0 1; do SLURM_NODEID=$node PATH="$TASK:/usr/bin:/bin" "$@" || exit; done""",
    "sleep": ":",
}
TASK = {
    "scontrol": "exit 127",
    "torchrun": 'kill -USR1 $$; echo "torchrun $OMP_NUM_THREADS $*"',
    "python": 'echo "python $*"',
}


def write_scripts(folder: Path, scripts: dict[str, str], shebang: str = "#!/bin/sh") -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in scripts.items():
        (folder / name).write_text(f"{shebang}\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def environment_of_job(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a batch shell of job 20007 on two nodes of four GPUs."""
    found = {name: value for name, value in free_environment().items() if not name.startswith(("SLURM", "NODE"))}
    found |= {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    found |= {"SLURM_GPUS_ON_NODE": "4", "MODEL": "m", "DATA": "d", "OUTPUT": str(folder / "output")}
    found |= {"TASK": str(write_scripts(folder / "task", TASK))}
    found["PATH"] = f"{write_scripts(folder / 'batch', BATCH)}:/usr/bin:/bin"
    return found | more


def run_job(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(JOB), *arguments],
        capture_output=True,
        text=True,
        env=environment_of_job(folder, **more),
        cwd=ROOT,
        check=False,
    )


def test_every_node_finds_rank_0_without_scontrol(tmp_path: Path) -> None:
    """The first host, a port of the job and the job's GPUs; a signal before the time limit does not end the task."""
    done = run_job(tmp_path, QWEN, "train")
    assert done.returncode == 0, done.stderr
    assert "rank 0 at first:10007" in done.stdout
    starts = re.findall(r"torchrun .*? --master-port \d+", done.stdout)
    assert starts == [
        f"torchrun 8 --nnodes 2 --nproc-per-node 4 --node-rank {node} --master-addr first --master-port 10007"
        for node in (0, 1)
    ]


def test_two_jobs_have_two_ports(tmp_path: Path) -> None:
    assert "first:10008" in run_job(tmp_path, QWEN, "train", SLURM_JOB_ID="20008").stdout


def test_a_step_of_one_process_runs_on_the_first_node_alone(tmp_path: Path) -> None:
    done = run_job(tmp_path, QWEN, "prepare")
    assert done.returncode == 0 and done.stdout.count("preprocess_preferences.py") == 1, done.stdout


@pytest.mark.parametrize(
    "image, expected",
    [
        (
            "nvcr.io#nvidia/pytorch:26.01-py3",
            "--container-image={image} --container-mounts={mounts} --container-workdir={root}",
        ),
        ("/images/simpo.sif", "apptainer exec --nv --bind {mounts} --pwd {root} {image}"),
    ],
    ids=["pyxis", "apptainer"],
)
def test_a_container_sees_the_current_folder_and_the_mounts(tmp_path: Path, image: str, expected: str) -> None:
    done = run_job(tmp_path, QWEN, "train", CONTAINER_IMAGE=image, CONTAINER_MOUNTS="/data:/data")
    words = " ".join(re.findall(r"^srun (.*)", done.stdout, re.MULTILINE))
    mounts = f"{ROOT}:{ROOT},/data:/data"
    assert words == f"--kill-on-bad-exit=1 {expected.format(image=image, mounts=mounts, root=ROOT)}", done.stderr


def test_the_environment_is_sourced_in_the_task(tmp_path: Path) -> None:
    """A script as conda's, which reads a variable that is not set."""
    script = tmp_path / "my env.sh"
    script.write_text("export OMP_NUM_THREADS=3$NOT_SET\nfalse\nPATH=$TASK:$PATH\n")
    done = run_job(tmp_path, QWEN, "train", ENV_SCRIPT=str(script))
    assert done.returncode == 0, done.stderr
    assert "torchrun 3 --nnodes" in done.stdout


@pytest.mark.parametrize(
    "arguments, changes, words",
    [
        (["missing/run.sh", "train"], {}, "'missing/run.sh' is not a file in .*; submit from the root"),
        ([QWEN, "train"], {"SLURM_JOB_NUM_NODES": "1"}, "has 1 nodes, but the run needs 2; give sbatch --nodes=2"),
        ([QWEN, "train"], {"ENV_SCRIPT": "/nowhere/env.sh"}, "ENV_SCRIPT /nowhere/env.sh is not a file"),
        ([QWEN, "train"], {"CONTAINER_MOUNTS": "/data:/data"}, "CONTAINER_IMAGE is not; set the image too"),
        ([QWEN, "train"], {"TASK": "/nowhere"}, "torchrun is not on PATH; activate the environment"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], changes: dict[str, str], words: str) -> None:
    done = run_job(tmp_path, *arguments, **changes)
    assert done.returncode == 2
    assert re.search(words, done.stderr), done.stderr


def run_on_a_node(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """run.sh without Slurm, under a pretended torchrun and python; a variable given as "" is not set."""
    environment = environment_of_job(folder, **more)
    environment = {name: value for name, value in environment.items() if value and not name.startswith("SLURM")}
    environment["PATH"] = f"{environment['TASK']}:/usr/bin:/bin"
    return subprocess.run(["bash", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False)


STEPS = "dry-run, convert, prepare, verify, train or export"


@pytest.mark.parametrize(
    "step, variables, words",
    [
        ("", {}, f"give a step: {STEPS}"),
        ("trian", {}, f"trian is not a step; use {STEPS}"),
        ("train", {"MODEL": ""}, "MODEL is not set; export MODEL=FOLDER, the Hugging Face checkpoint"),
        ("train", {"OUTPUT": ""}, "OUTPUT is not set; export OUTPUT=FOLDER, where this step writes"),
        ("train", {"DATA": ""}, "DATA is not set; export DATA=FILE, the preferences to train on"),
        ("verify", {"DATA": ""}, "DATA is not set; export DATA=FILE, preferences to verify with"),
        (
            "train",
            {"ENV_SCRIPT": "/nowhere"},
            "ENV_SCRIPT /nowhere is not a file that can be read; give a shell script",
        ),
        ("train", {}, "MASTER_ADDR is not set: the host name of the node with rank 0"),
        ("train", {"NODE_RANK": "2"}, "NODE_RANK is 2; it must be a number from 0 to 1"),
        ("train", {"MASTER_PORT": "99999"}, "MASTER_PORT is 99999; it must be a number from 1 to 65535"),
        ("export", {}, "{output}/run has no checkpoint yet; train first"),
    ],
)
def test_a_mistake_without_slurm_is_one_line(tmp_path: Path, step: str, variables: dict[str, str], words: str) -> None:
    done = run_on_a_node(tmp_path, QWEN, *step.split(), **variables)
    expected = f"run.sh: {words.format(output=tmp_path / 'output')}\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize("alone", [True, False])
def test_a_config_alone_is_verified_without_data(tmp_path: Path, alone: bool) -> None:
    model = tmp_path / "a model"
    model.mkdir()
    (model / "config.json").touch()
    if not alone:
        (model / "tokenizer.json").touch()
    done = run_on_a_node(tmp_path, QWEN, "verify", MODEL=str(model), MASTER_ADDR="first")
    assert done.returncode == 0 and f"--hf-checkpoint {model}" in done.stdout
    assert ("--data d" in done.stdout) != alone
    if alone:
        more = {"MODEL": "examples/qwen3_moe/model.json", "DATA": "", "MASTER_ADDR": "first"}
        assert run_on_a_node(tmp_path, QWEN, "verify", **more).returncode == 0


def test_a_second_call_of_a_conversion_goes_on_or_ends_well(tmp_path: Path) -> None:
    """An export that is there counts only where it is newer than the checkpoint."""
    for flag in ([], ["--resume"], ["--overwrite"]):
        words = run_on_a_node(tmp_path, QWEN, "convert", *flag).stdout.split()
        assert words[-1] == (flag or ["--resume"])[0] and len(set(words)) == len(words)
    latest = tmp_path / "output" / "run" / "latest_checkpointed_iteration.txt"
    exported = tmp_path / "output" / "aligned-20" / "config.json"
    for file in (latest, exported):
        file.parent.mkdir(parents=True)
        file.write_text("20")
    for age, done_already in ((-1, True), (1, False)):
        os.utime(exported, (0, latest.stat().st_mtime - age))
        done = run_on_a_node(tmp_path, QWEN, "export")
        assert done.returncode == 0 and done.stdout.startswith("nothing is left to do: ") == done_already
        assert ("megatron_to_hf.py" in done.stdout) != done_already
    exported.unlink()
    assert f"--save {exported.parent} --resume" in run_on_a_node(tmp_path, QWEN, "export").stdout


# An srun whose run saves {saved}, after which Slurm signals the batch shell; then it ends with {ends}, or is stopped.
SIGNALLED = """
import os, pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("srun was signalled", flush=True) or {ends})
saved = {saved}
if saved:
    folder = pathlib.Path(os.environ["OUTPUT"], "run")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest_checkpointed_iteration.txt").write_text(saved)
pathlib.Path(os.environ["OUTPUT"]).with_name("pid").write_text(str(os.getpid()))
os.kill(os.getppid(), signal.SIGUSR1)
while True:
    signal.pause()
"""


def run_signalled_job(folder: Path, saved: str | None, ends: str = "None") -> tuple[int, str, str]:
    """A job whose time limit comes near; a requeue stops srun, as Slurm does. Exit code, output and requeued job."""
    requeue = folder / "requeue"
    requeue.write_text(f'echo "$2" > {folder}/requeued; kill "$(cat {folder}/pid)" 2>/dev/null || true')
    environment = environment_of_job(folder, REQUEUE=str(requeue))
    script = SIGNALLED.format(saved=repr(saved), ends=ends)
    write_scripts(folder / "batch", {"srun": script}, f"#!{sys.executable}")
    job = subprocess.Popen(
        ["bash", str(JOB), QWEN, "train"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert job.stdout
    lines = []
    for line in job.stdout:
        lines.append(line)
        if "not queued again" in line:
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
    requeued = folder / "requeued"
    return job.wait(), "".join(lines), requeued.read_text().strip() if requeued.exists() else ""


def test_a_run_that_saved_is_queued_again_before_its_time_limit(tmp_path: Path) -> None:
    code, output, requeued = run_signalled_job(tmp_path, "20")
    assert "srun was signalled" in output and "resumes from checkpoint 20" in output
    assert requeued == "20007" and code != 0


def test_a_run_that_saved_nothing_is_not_queued_again(tmp_path: Path) -> None:
    """It would start at the same step each time."""
    (tmp_path / "output" / "run").mkdir(parents=True)
    (tmp_path / "output" / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    code, output, requeued = run_signalled_job(tmp_path, None)
    assert "latest checkpoint 20" in output and "--save-interval" in output
    assert not requeued and code != 0


@pytest.mark.parametrize("saved, ends, again", [("20", 0, True), (None, 0, False), ("20", 3, False)])
def test_a_run_that_saves_at_the_signal_is_queued_again(
    tmp_path: Path, saved: str | None, ends: int, again: bool
) -> None:
    """And the job has the exit code of the run. A run that fails, or gets no further, is not queued again."""
    code, output, requeued = run_signalled_job(tmp_path, saved, f"os._exit({ends})")
    assert code == ends and requeued == ("20007" if again else "")
    assert ("resumes from checkpoint 20" in output) == again


def test_a_run_that_reaches_its_end_after_the_signal_is_not_queued_again(tmp_path: Path) -> None:
    export = f"{tmp_path}/output/aligned"
    ends = f"(os.mkdir({export!r}), open({export!r} + '/config.json', 'w').close(), os._exit(0))"
    code, _, requeued = run_signalled_job(tmp_path, "20", ends)
    assert code == 0 and not requeued


def test_the_job_outlives_a_requeue() -> None:
    """Slurm may queue it again, appends to its log, and warns the batch shell before the time limit."""
    flags = re.findall(r"^#SBATCH (\S+)$", JOB.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(flags)
