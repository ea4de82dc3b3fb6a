"Files that were damaged between two starts: what can be made again is, what can't is named with the way out"

import shutil
import subprocess
import sys

import pytest

SMALL = ["-c", "smoke", "pairs.n_prompts=16", "data.n_test=4", "report_to=none", "keep_checkpoints=true"]
RUN = [sys.executable, "-c", "import sys; from specs_nb.pipeline import main; sys.exit(main())"]


def specs(*words):
    return subprocess.run([*RUN, *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "a"
    r = specs("coldstart", *SMALL, "--run-dir", run)
    assert r.returncode == 0, r.stderr[-2000:]
    return run


@pytest.fixture
def run(done, tmp_path):
    return shutil.copytree(done, tmp_path / "r")


def unfinished(run, stage):
    "As a kill after the last checkpoint leaves it"
    import json

    p = run / stage / "stage.json"
    p.write_text(json.dumps({**json.loads(p.read_text()), "state": "running"}))
    shutil.rmtree(run / stage / "model")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_truncated_checkpoint_is_passed_over(done, run, name):
    unfinished(run, "zero")
    cut(next((run / "zero/checkpoints").glob(f"checkpoint-*/{name}")))
    r = specs("zero", "--run-dir", run)
    assert r.returncode == 0 and "is damaged" in r.stdout and name in r.stdout, r.stderr[-2000:]
    assert (run / "zero/model/model.safetensors").read_bytes() == (
        done / "zero/model/model.safetensors"
    ).read_bytes()


def test_cut_while_the_model_was_saved(done, run):
    "All steps were taken: none is taken again, and none more."
    unfinished(run, "zero")
    unfinished(run, "coldstart")
    r = specs("coldstart", "--run-dir", run)
    assert r.returncode == 0 and r.stdout.count("it was cut off") == 2, r.stderr[-2000:]
    for f in ("zero/model/model.safetensors", "coldstart/model/adapter_model.safetensors"):
        assert (run / f).read_bytes() == (done / f).read_bytes(), f


def test_truncated_pairs_are_named(run):
    cut(run / "pairs/pairs.parquet")
    r = specs("coldstart", "--run-dir", run, "coldstart.lam=0.5")
    assert (
        r.returncode == 2
        and "pairs.parquet can't be read as pairs" in r.stderr
        and "Traceback" not in r.stderr
    ), r.stderr[-2000:]
    (run / "pairs/pairs.parquet").unlink()
    assert specs("coldstart", "--run-dir", run, "coldstart.lam=0.5").returncode == 0, "the way out works"


def test_a_half_written_stage_file_is_named(run):
    cut(run / "zero/stage.json")
    r = specs("coldstart", "--run-dir", run)
    assert (
        r.returncode == 2
        and "zero/stage.json is no valid JSON: delete it" in r.stderr
        and "Traceback" not in r.stderr
    )


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    "Costs come from a monotonic clock; a day forth and back between two stages breaks nothing."
    code = """
import itertools, time, sys
real, jump = time.time, itertools.count()
time.time = lambda: real() + (86400 if next(jump) % 2 else -86400)
from specs_nb.pipeline import main
sys.exit(main())
"""
    r = subprocess.run(
        [sys.executable, "-c", code, "zero", *SMALL, "--run-dir", str(tmp_path / "r")],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    import json

    assert 0 <= json.loads((tmp_path / "r/zero/stage.json").read_text())["seconds"] < 600


@pytest.mark.skipif(
    not hasattr(__import__("os"), "geteuid") or __import__("os").geteuid() != 0,
    reason="mounting a small disk needs root",
)
def test_a_full_disk_is_said_and_survived(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        r = specs("zero", *SMALL, "--run-dir", disk / "r")
        assert r.returncode == 2 and "is full" in r.stderr and "Traceback" not in r.stderr, r.stderr[-2000:]
        subprocess.run(["mount", "-o", "remount,size=80m", disk], check=True)
        r = specs("zero", *SMALL, "--run-dir", disk / "r")
        assert r.returncode == 0 and "it was cut off" in r.stdout, r.stderr[-2000:]
    finally:
        subprocess.run(["umount", disk], check=True)
