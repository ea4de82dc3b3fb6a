"""Several processes: what they compute is what one computes; what falls is told; nothing is lost. gloo on the
CPU, two processes"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from specs_nb.core import Run, SpecsError
from specs_nb.scale.launch import accelerate_configs, launcher_words

ROOT = Path(__file__).resolve().parent.parent
TWO = "torchrun --nproc_per_node 2"
SMALL = [
    "-c",
    "smoke",
    "zero.steps=4",
    "zero.trainer.report_to=none",
    "pairs.n_prompts=16",
    "pairs.batch_size=16",
]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def start(*words):
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from specs_nb.pipeline import main; sys.exit(main())",
            *map(str, words),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        start_new_session=True,
    )


def specs(*words):
    "(exit code, stdout, stderr) of `specs`"
    p = start(*words)
    out, err = p.communicate(timeout=300)
    return p.returncode, out, err


def until(found, seconds=120):
    "What `found` finds, waited for"
    for _ in range(seconds * 10):
        if hit := found():
            return hit
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def ranks_of(run):
    "Process ids of a run's ranks"
    pids = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            words = (p / "cmdline").read_bytes().decode().split("\0")
        except OSError:
            continue
        if (
            str(run) in words
            and "specs_nb.scale.launch" in words
            and not {"torch.distributed.run", "accelerate.commands.accelerate_cli"} & set(words)
        ):
            pids.append(int(p.name))
    return pids


def stage(run, name):
    return json.loads((run / name / "stage.json").read_text())


def steps(run, name):
    return [h["step"] for h in json.loads((run / name / "history.json").read_text())]


# ---- the same numbers


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    "Three steps of DPO, DPO+SFT and GRPO, with and without chosen questions, by one process and by two"
    out = tmp_path_factory.mktemp("case")
    for name, command in (("one", [sys.executable]), ("two", launcher_words(TWO))):
        r = subprocess.run(
            [*command, str(ROOT / "tests/ranks_case.py"), str(out / name)],
            capture_output=True,
            text=True,
            env=ENV,
        )
        assert r.returncode == 0, r.stderr[-3000:]
    return out


def same(one, two, case):
    "Losses, gradients and weights of both folders agree to float32's rounding, and the weights moved"
    from specs_nb.engines.models import load_model

    start, a, b = (load_model(str(d))[0].state_dict() for d in ("tiny", one / "model", two / "model"))
    one, two = (json.loads((d / "history.json").read_text()) for d in (one, two))
    assert len(one) == len(two) == 3
    for h, k in zip(one, two):
        keys = ["loss", "grad_norm", "rewards/margins" if case.startswith("dpo") else "reward"]
        for key in [*keys, *(n for n in h if n.startswith(("questions/", "validate/")))]:
            assert float(h[key]) == pytest.approx(float(k[key]), rel=1e-4, abs=1e-5), (case, key)
    assert len({h["loss"] for h in one}) == 3, "the weights moved"
    moved, apart = (max((x[k] - y[k]).abs().max().item() for k in x) for x, y in ((start, b), (a, b)))
    assert apart < 1e-5 < 1e-3 < moved, (apart, moved)


@pytest.mark.parametrize("case", ["dpo", "dpo+sft", "grpo", "chosen"])
def test_two_processes_compute_what_one_does(both, case):
    same(both / "one" / case, both / "two" / case, case)


def test_two_processes_choose_the_questions_that_one_does(both):
    one, two = (json.loads((both / d / "chosen/history.json").read_text()) for d in ("one", "two"))
    assert any(h["questions/extra"] for h in one), "something was replaced"
    assert [h["questions/extra"] for h in one] == [h["questions/extra"] for h in two]
    assert [h.get("validate/accuracy") for h in one] == [h.get("validate/accuracy") for h in two]
    assert sum("validate/accuracy" in h for h in two) == 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_pieces(out, *case, name="fsdp2", more=""):
    "ranks_case.py under an accelerate configuration that ships, two processes"
    command = launcher_words(f"{name} --num_processes 2 --main_process_port {free_port()} {more}")
    words = [*command, str(ROOT / "tests/ranks_case.py"), str(out), *case]
    r = subprocess.run(words, capture_output=True, text=True, env={**ENV, "DS_ACCELERATOR": "cpu"})
    assert r.returncode == 0, r.stderr[-3000:]


def test_fsdp2_computes_what_one_process_does(both):
    "DPO and GRPO, the models saved and loaded again; the configuration that ships, but for bfloat16"
    in_pieces(both / "pieces", "pieces", more="--mixed_precision no")
    for case in ("dpo", "grpo"):
        same(both / "one" / case, both / "pieces" / case, case)


def loads_again(out):
    "One step of DPO and one of GRPO left adapters that load, and changed what they may"
    import torch

    from specs_nb.engines.models import is_adapter, load_model

    for case in ("dpo", "grpo"):
        folder = out / case / "model"
        assert is_adapter(folder) and len(json.loads((out / case / "history.json").read_text())) == 1
        whole, bare = load_model(str(folder))[0].state_dict(), load_model("tiny")[0].state_dict()
        moved = {k for k in bare if not torch.equal(whole[k], bare[k])}
        assert moved and all("_proj" in k and "visual" not in k for k in moved), moved


def test_fsdp2_trains_an_adapter_that_loads_again(tmp_path):
    "As it ships: bfloat16 weights in pieces, an adapter in float32, answers written by the spread model"
    in_pieces(tmp_path, "shipped")
    loads_again(tmp_path)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed isn't installed")
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_computes_what_one_process_does(name, both, tmp_path):
    "Where DeepSpeed is; it was run so by hand, see the end of 20_launch"
    in_pieces(both / name, "pieces", "deepspeed", name=name, more="--mixed_precision no")
    for case in ("dpo", "grpo"):
        same(both / "one" / case, both / name / case, case)
    in_pieces(tmp_path, "shipped", "deepspeed", name=name)
    loads_again(tmp_path)


# ---- a run that is stopped, killed, and goes on


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Stopped by SIGTERM in `zero`, then killed in it, then brought up to `pairs`"
    run = tmp_path_factory.mktemp("runs") / "r"
    words = [*SMALL, "--run-dir", run, "--launcher", TWO]
    p = start("zero", *words)
    until(lambda: list(run.glob("zero/checkpoints/checkpoint-1/trainer_state.json")))
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 143 and "goes on from there" in err, (p.returncode, err[-2000:])
    done = steps(run, "zero")
    assert (
        stage(run, "zero")["state"] == "running" and done == list(range(1, len(done) + 1)) and len(done) < 4
    )
    assert (run / f"zero/checkpoints/checkpoint-{done[-1]}/rng_state_1.pth").exists() and not ranks_of(run)

    p = start("zero", *words)
    until(lambda: len(ranks_of(run)) == 2)
    with pytest.raises(SpecsError, match="another run is at work"):
        Run(run)
    p.kill()
    p.communicate()
    until(lambda: not ranks_of(run), 30)
    until(
        lambda: not subprocess.run(
            ["pgrep", "-f", f"torch.distributed.run.*{run}"], capture_output=True
        ).stdout,
        30,
    )

    code, out, err = specs("pairs", *words)
    assert code == 0, err[-3000:]
    assert "zero       it was cut off" in out.replace("\r", "\n")
    return run


def test_only_rank_0_writes(run):
    s = stage(run, "zero")
    assert (
        s["state"] == "done"
        and s["processes"] == 2
        and s["steps"] == 4
        and s["seconds"] > 0
        and s["peak_memory_gb"] > 0.1
    )
    assert steps(run, "zero") == [1, 2, 3, 4], "each step once"
    for name in ("zero", "pairs"):
        assert (
            (run / name / "ranks.log").exists()
            and not list((run / name).glob("fallen-*"))
            and not (run / name / "facts.json").exists()
        )


def test_stopped_and_killed_it_ends_as_if_it_never_was(run, tmp_path):
    code, out, err = specs("zero", *SMALL, "--run-dir", tmp_path / "whole", "--launcher", TWO)
    assert code == 0, err[-2000:]
    assert (tmp_path / "whole/zero/model/model.safetensors").read_bytes() == (
        run / "zero/model/model.safetensors"
    ).read_bytes()


def test_answers_do_not_depend_on_the_number_of_processes(run, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(run / "zero", one / "zero")
    shutil.copy(run / "config.yaml", one)
    code, out, err = specs("pairs", "--run-dir", one, "workers=1")
    assert code == 0 and out.count("done before") == 1, err[-2000:]
    assert len(list((one / "pairs/samples").glob("zero-*.json"))) > 2, "several batches"
    for f in ("pairs.parquet", "samples.parquet"):
        assert (one / "pairs" / f).read_bytes() == (run / "pairs" / f).read_bytes()


# ---- what falls


def test_a_killed_rank_ends_the_run(tmp_path):
    run = tmp_path / "r"
    p = start("zero", *SMALL, "--run-dir", run, "--launcher", TWO)
    os.kill(until(lambda: len(r := ranks_of(run)) == 2 and r)[1], 9)
    out, err = p.communicate(timeout=120)
    assert (
        p.returncode == 1 and "no rank could say why" in err and "the same command goes on from there" in err
    ), err[-2000:]
    assert stage(run, "zero")["state"] == "running" and not ranks_of(run)


def test_no_such_launcher(tmp_path):
    code, out, err = specs(
        "zero", *SMALL, "--run-dir", tmp_path / "r", "--launcher", "torchrn --nproc_per_node 2"
    )
    assert code == 2 and "did you mean 'torchrun'?" in err


# ---- accelerate's configurations


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configuration(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(accelerate_configs()[name]))
    assert config.distributed_type.name == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    words = launcher_words(f"{name} --num_processes 8")
    args, defaults, _ = _validate_launch_command(
        launch_command_parser().parse_args([*words[4:], "-m", "specs_nb.scale.launch"])
    )
    assert args.num_processes == 8 and (args.use_fsdp, args.use_deepspeed, args.multi_gpu) == (
        name == "fsdp2",
        name.startswith("zero"),
        name == "ddp",
    )
    if name == "fsdp2":
        assert (args.fsdp_version, args.fsdp_state_dict_type, args.mixed_precision) == (
            2,
            "FULL_STATE_DICT",
            "bf16",
        )
    if name.startswith("zero"):
        assert args.zero_stage == int(name[-1]) and args.gradient_accumulation_steps == "auto"


@pytest.mark.parametrize("words", ["accelerate launch --cpu --num_processes 2", "ddp --num_processes 2"])
def test_accelerate_starts_two_processes_on_the_cpu(words, tmp_path):
    (tmp_path / "whoami.py").write_text(
        "import os; os.write(1, f\"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n\".encode())  #"
        " in one piece: both write at once"
    )
    port = ["--main_process_port", "0"]
    r = subprocess.run(
        [*launcher_words(words), *port, str(tmp_path / "whoami.py")], capture_output=True, text=True, env=ENV
    )
    assert r.returncode == 0 and sorted(r.stdout.splitlines()) == ["rank 0 of 2", "rank 1 of 2"], r.stderr[
        -2000:
    ]


# ---- the examples in docs/

EXAMPLES = ROOT / "docs/examples"


def test_slurm_example(tmp_path):
    """Run with stand-ins for SLURM's commands: each node starts accelerate with its own rank and what specs
    adds"""
    stub = tmp_path / "bin"
    stub.mkdir()

    def write(name, text):
        (stub / name).write_text(text)
        (stub / name).chmod(0o755)

    write("scontrol", "#!/bin/sh\necho node0\necho node1\n")
    write("srun", '#!/bin/bash\nshift 2\nfor i in 0 1; do SLURM_NODEID=$i "$@"; done\n')
    write("accelerate", '#!/bin/sh\necho accelerate "$@"\n')
    write("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    write(
        "specs",
        f"#!{sys.executable}\nimport subprocess\nfrom specs_nb.pipeline import parse\nfrom specs_nb.ranks"
        " import launcher_words\nargs = parse()\nsubprocess.run([*launcher_words(args.launcher), '-m',"
        " 'specs_nb.scale.launch', args.run_dir, 'zero'], check=True)\n",
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(f'export PATH="{stub}:$PATH"\n')
    env = {**ENV, "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    r = subprocess.run(
        ["bash", str(EXAMPLES / "slurm.sbatch")], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    lines = r.stdout.splitlines()
    assert r.returncode == 0 and len(lines) == 2, r.stderr
    for i, line in enumerate(lines):
        assert line.startswith(
            f"accelerate launch --config_file {accelerate_configs()['fsdp2']}"
        ) and line.endswith("-m specs_nb.scale.launch runs/paper zero"), line
        assert (
            f"--num_machines 2 --num_processes 16 --machine_rank {i} --main_process_ip node0"
            " --main_process_port 20007 "
            in line
        )


def test_other_examples():
    "They are YAML, and our command line takes what they run, with a configuration that is shipped"
    import yaml

    from specs_nb.core import load_config
    from specs_nb.pipeline import parse

    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())["spec"]["template"]["spec"][
        "containers"
    ][0]
    sky = (
        yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())["run"]
        .splitlines()[-1]
        .removeprefix("exec ")
        .split()
    )
    for words in (job["command"], sky):
        args = parse(words[1:])
        assert words[0] == "specs"
        assert args.stage == "report"
        assert args.launcher in accelerate_configs()
        load_config(args.config)  # raises for a name that isn't shipped
