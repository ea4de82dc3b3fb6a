"""Ctrl-C and SIGTERM: the step is finished and saved, the run says how to go on, and ends as if nothing had
happened"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

SMALL = [
    "-c",
    "smoke",
    "pairs.n_prompts=16",
    "data.n_test=4",
    "zero.steps=6",
    "zero.trainer.save_steps=6",
    "zero.trainer.max_completion_length=48",
]
RUN = [sys.executable, "-c", "import sys; from specs_nb.pipeline import main; sys.exit(main())"]


def start(run, stage):
    return subprocess.Popen(
        [*RUN, stage, *SMALL, "--run-dir", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path, process, seconds=300):
    end = time.time() + seconds
    while not list(path.parent.glob(path.name)):
        if process.poll() is not None or time.time() > end:
            process.kill()
            pytest.fail(f"{path} never came: {process.communicate()}")
        time.sleep(0.02)


@pytest.mark.parametrize("sig, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_training_finishes_its_step_saves_and_goes_on(tmp_path, sig, code):
    p = start(tmp_path / "r", "zero")
    wait_for(tmp_path / "r/zero/samples/00001.json", p)  # the first step is logged
    p.send_signal(sig)
    out, err = p.communicate(timeout=300)
    assert p.returncode == code and "Traceback" not in err, err[-2000:]
    step, total = map(
        int, re.search(r"zero is saved after step (\d+) of (\d+)\. The same command goes on", err).groups()
    )
    assert 1 <= step < total == 6
    assert (tmp_path / f"r/zero/checkpoints/checkpoint-{step}/trainer_state.json").exists()
    assert [h["step"] for h in json.loads((tmp_path / "r/zero/history.json").read_text())] == list(
        range(1, step + 1)
    )
    again = subprocess.run(
        [*RUN, "zero", *SMALL, "--run-dir", str(tmp_path / "r")], capture_output=True, text=True
    )
    assert again.returncode == 0 and "it was cut off" in again.stdout, again.stderr[-2000:]
    assert [h["step"] for h in json.loads((tmp_path / "r/zero/history.json").read_text())] == list(
        range(1, 7)
    )
    if sig == signal.SIGTERM:
        whole = subprocess.run(
            [*RUN, "zero", *SMALL, "--run-dir", str(tmp_path / "whole")], capture_output=True, text=True
        )
        assert whole.returncode == 0
        assert (tmp_path / "whole/zero/model/model.safetensors").read_bytes() == (
            tmp_path / "r/zero/model/model.safetensors"
        ).read_bytes()


def test_sampling_finishes_its_batches_and_goes_on(tmp_path):
    "The signal goes to the whole process group, as a terminal's Ctrl-C does."
    sizes = ["pairs.n_prompts=64", "pairs.batch_size=8", "workers=2"]
    run = lambda d, *extra: subprocess.run(
        [*RUN, "pairs", *SMALL, "--run-dir", str(d), *extra], capture_output=True, text=True
    )
    assert run(tmp_path / "r").returncode == 0  # zero, and pairs once
    p = subprocess.Popen(
        [*RUN, "pairs", *SMALL, "--run-dir", str(tmp_path / "r"), *sizes],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "r/pairs/samples/base-[2-9].json", p)
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 130 and "Traceback" not in err, err[-2000:]
    kept, total = map(int, re.search(r"pairs: (\d+) of (\d+) questions are answered and saved", err).groups())
    assert 0 < kept < total == 128
    again = run(tmp_path / "r", *sizes)
    assert again.returncode == 0 and "it was cut off" in again.stdout, again.stderr[-2000:]
