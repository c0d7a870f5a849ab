"""Pairs: a run of tools/build_pairs.py that is killed leaves its file whole or absent; the next one ends the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import write_rows
from tools import build_pairs

ROOT = Path(__file__).resolve().parents[2]
# What a run does with itself, by the moment: among the rows that it writes, or when all are on the disk.
KILLS = {
    "a row": (
        "build = pairing.build_pairs\n"
        "def building(*args):\n"
        "    for number, row in enumerate(build(*args)):\n"
        "        yield row\n"
        "        if number == 80:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "pairing.build_pairs = building\n"
    ),
    "the rename": "os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)\n",
}


@pytest.mark.parametrize(("moment", "before"), [("a row", None), ("the rename", b"of an earlier run\n")])
def test_a_killed_run_leaves_the_file_whole_or_absent(moment: str, before: bytes | None, tmp_path: Path) -> None:
    responses = [{"content": "amber " * n, "score": n} for n in range(1, 5)]
    source = write_rows(tmp_path / "scored.jsonl", [{"prompt": f"p{i}", "responses": responses} for i in range(100)])
    whole, output, begun = (tmp_path / name for name in ("whole.jsonl", "pairs.jsonl", ".pairs.jsonl.tmp"))
    flags = ["--data", str(source), "--strategy", "best-random", "--output"]
    assert build_pairs.main([*flags, str(whole)]) == 0
    if before is not None:
        output.write_bytes(before)
    argv = ["tools/build_pairs.py", *flags, str(output)]
    code = (
        "import os, runpy, signal, sys\n"
        "from simpo_megatron.data import pairing\n"
        f"{KILLS[moment]}"
        f"sys.argv = {argv!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert 0 < begun.stat().st_size <= whole.stat().st_size, "killed in the middle"
    assert (output.read_bytes() if output.exists() else None) == before
    assert build_pairs.main(argv[1:]) == 0
    assert output.read_bytes() == whole.read_bytes() and not begun.exists()
