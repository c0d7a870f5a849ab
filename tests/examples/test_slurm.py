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
        ([QWEN, "train"], {"ENV_SCRIPT": "/nowhere/env.sh"}, "ENV_SCRIPT /nowhere/env.sh failed"),
        ([QWEN, "train"], {"TASK": "/nowhere"}, "torchrun is not on PATH; activate the environment"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: list[str], changes: dict[str, str], words: str) -> None:
    done = run_job(tmp_path, *arguments, **changes)
    assert done.returncode == 2
    assert re.search(words, done.stderr), done.stderr


def test_without_slurm_the_address_is_asked_for(tmp_path: Path) -> None:
    environment = environment_of_job(tmp_path)
    environment = {name: value for name, value in environment.items() if not name.startswith("SLURM")}
    environment["PATH"] = f"{environment['TASK']}:/usr/bin:/bin"
    done = subprocess.run(
        ["bash", QWEN, "train"], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert done.returncode == 2 and "MASTER_ADDR is not set" in done.stderr
    for name, value, words in (("NODE_RANK", "2", "from 0 to 1"), ("MASTER_PORT", "99999", "from 1 to 65535")):
        done = subprocess.run(
            ["bash", QWEN, "train"],
            capture_output=True,
            text=True,
            env={**environment, name: value},
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 2 and f"{name} is {value}; it must be a number {words}" in done.stderr


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
    requeue.write_text(f'echo "$2" > {folder}/requeued; kill "$(cat {folder}/pid)"')
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


@pytest.mark.parametrize("ends", [0, 3])
def test_a_run_that_ends_after_the_signal_gives_the_job_its_code(tmp_path: Path, ends: int) -> None:
    code, _, requeued = run_signalled_job(tmp_path, "20", f"os._exit({ends})")
    assert code == ends and not requeued


def test_the_job_outlives_a_requeue() -> None:
    """Slurm may queue it again, appends to its log, and warns the batch shell before the time limit."""
    flags = re.findall(r"^#SBATCH (\S+)$", JOB.read_text(), re.MULTILINE)
    assert {"--requeue", "--open-mode=append", "--signal=B:USR1@300"} <= set(flags)
