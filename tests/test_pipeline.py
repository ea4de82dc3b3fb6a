"The `specs` command: what it does twice, what it does after a cut, what it says about bad input"

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from specs_nb.core import Config, Run, SpecsError, builtin_configs, load_config
from specs_nb.pipeline import STAGES, main

SMALL = ["-c", "smoke", "pairs.n_prompts=16", "data.n_test=4"]


def specs(*words, **kw):
    "`specs` in a process of its own"
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from specs_nb.pipeline import main; sys.exit(main())",
            *map(str, words),
        ],
        capture_output=True,
        text=True,
        **kw,
    )


def states(run):
    return {
        s: json.loads((run / s / "stage.json").read_text())
        for s in STAGES
        if (run / s / "stage.json").exists()
    }


def says(result, *words):
    "Exit code 2 and one line on stderr with these words"
    lines = [l for l in result.stderr.splitlines() if l.startswith("specs: ")]
    assert result.returncode == 2 and len(lines) == 1, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    for w in words:
        assert w in lines[0], lines[0]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A finished smoke run"
    run = tmp_path_factory.mktemp("runs") / "a"
    r = specs("run", *SMALL, "--run-dir", run)
    assert r.returncode == 0, r.stderr[-3000:]
    return run


def test_a_run_leaves_what_others_rely_on(done):
    for f in (
        "config.yaml",
        "zero/model/model.safetensors",
        "pairs/pairs.parquet",
        "coldstart/model/adapter_model.safetensors",
        "final/model/model.safetensors",
        "eval/metrics.json",
        "report.html",
    ):
        assert (done / f).exists(), f
    metrics = json.loads((done / "eval/metrics.json").read_text())
    assert set(metrics) == {"base", "zero", "coldstart", "final"}
    for model in metrics.values():
        assert set(model) == {"id", "ood_format", "ood_visual", "compositional"}
        for split in model.values():
            for m in split.values():
                assert set(m) == {"mean", "lo", "hi", "n"} and m["lo"] <= m["mean"] <= m["hi"]
    for s in states(done).values():
        assert s["state"] == "done" and s["seconds"] >= 0 and 0 < s["peak_memory_gb"] < 8


def test_each_stage_says_where_its_time_went(done):
    spent = {name: s["seconds_by"] for name, s in states(done).items()}
    for name, s in states(done).items():
        assert sum(spent[name].values()) == pytest.approx(s["seconds"], rel=0.05, abs=0.1), name
    for name in ("zero", "final"):
        assert {"fetch", "write", "score", "train", "save"} <= spent[name].keys(), name
    assert {"score", "train", "save"} <= spent["coldstart"].keys()
    for name in ("pairs", "eval"):
        assert spent[name]["write"] > 0.5 * sum(spent[name].values()), name
    report = (done / "report.html").read_text()
    assert "Where the time went" in report


def test_again_skips_everything(done):
    before = states(done)
    r = specs("run", *SMALL, "--run-dir", done)
    assert r.returncode == 0 and r.stdout.count("done before") == len(STAGES) and states(done) == before


def test_the_run_folder_keeps_its_configuration(done):
    assert specs("run", "--run-dir", done).stdout.count("done before") == len(STAGES)


def test_a_changed_value_redoes_what_follows_from_it(done, tmp_path):
    import shutil

    run = tmp_path / "b"
    shutil.copytree(done, run)
    r = specs("coldstart", "--run-dir", run, "coldstart.lam=0.5")
    assert r.returncode == 0
    assert [l.split()[0] for l in r.stdout.splitlines() if "done before" in l] == ["zero", "pairs"]
    assert "changed: coldstart.lam 1.0 → 0.5" in r.stdout
    assert (run / "coldstart.before-1/model/adapter_model.safetensors").exists(), "what was there is kept"
    assert (
        states(run)["coldstart"]["lam"] == 0.5
        and (run / "pairs/pairs.parquet").read_bytes() == (done / "pairs/pairs.parquet").read_bytes()
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(done, tmp_path):
    r = specs("final", *SMALL, "--run-dir", tmp_path / "same")
    assert r.returncode == 0
    for f in ("pairs/pairs.parquet", "final/model/model.safetensors"):
        assert (tmp_path / "same" / f).read_bytes() == (done / f).read_bytes(), f
    r = specs("zero", *SMALL, "--run-dir", tmp_path / "other", "seed=1")
    assert (tmp_path / "other/zero/model/model.safetensors").read_bytes() != (
        done / "zero/model/model.safetensors"
    ).read_bytes()


def test_a_killed_run_goes_on_and_ends_the_same(done, tmp_path):
    run = tmp_path / "killed"
    cmd = [
        sys.executable,
        "-c",
        "import sys; from specs_nb.pipeline import main; sys.exit(main())",
        "final",
        *SMALL,
        "--run-dir",
        str(run),
    ]
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.time() + 300
    saved = lambda: list(run.glob("*/checkpoints/checkpoint-1/rng_state.pth"))
    while not saved() and p.poll() is None and time.time() < until:
        time.sleep(0.02)
    os.killpg(p.pid, 9)
    p.wait()
    assert [s["state"] for s in states(run).values()][-1] == "running", "of the first stages one is cut off"
    r = specs("final", *SMALL, "--run-dir", run)
    assert r.returncode == 0 and "it was cut off" in r.stdout
    for f in ("pairs/pairs.parquet", "final/model/model.safetensors"):
        assert (run / f).read_bytes() == (done / f).read_bytes(), f


def test_a_lost_model_is_made_again(done, tmp_path):
    import shutil

    run = tmp_path / "r"
    shutil.copytree(done, run)
    shutil.rmtree(run / "coldstart/model")
    r = specs("coldstart", "--run-dir", run)
    assert (
        r.returncode == 0
        and r.stdout.count("done before") == 2
        and "model/tokenizer_config.json is missing" in r.stdout
    )
    assert (run / "coldstart/model/adapter_model.safetensors").read_bytes() == (
        done / "coldstart/model/adapter_model.safetensors"
    ).read_bytes()


# ---- bad input


def test_unknown_key(tmp_path):
    says(specs("run", "--run-dir", tmp_path, "zero.stpes=3"), "zero.stpes", "did you mean 'steps'?")
    (tmp_path / "c.yaml").write_text("coldstart: {lamda: 1}")
    says(
        specs("run", "--run-dir", tmp_path / "r", "-c", tmp_path / "c.yaml"),
        "c.yaml",
        "coldstart.lamda",
        "'lam'",
    )


def test_unknown_trainer_key(tmp_path):
    says(
        specs("zero", *SMALL, "--run-dir", tmp_path / "r", "zero.trainer.leraning_rate=1"),
        "zero.trainer.leraning_rate",
        "'learning_rate'",
    )


def test_unknown_trainer_key_of_a_late_stage_is_told_before_anything_is_trained(tmp_path):
    says(
        specs("run", *SMALL, "--run-dir", tmp_path / "r", "final.trainer.leraning_rate=1"),
        "final.trainer.leraning_rate",
        "'learning_rate'",
    )
    assert not (tmp_path / "r/zero/model").exists()


def test_negative_lambda(tmp_path):
    says(specs("run", "--run-dir", tmp_path, "coldstart.lam=-1"), "λ", "0 or more")


def test_broken_yaml(tmp_path):
    (tmp_path / "c.yaml").write_text("zero: [")
    says(specs("run", "--run-dir", tmp_path / "r", "-c", tmp_path / "c.yaml"), "c.yaml", "no valid YAML")


def test_yaml_makes_no_objects(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path"
        f" ['{tmp_path}/x']]"
    )
    says(specs("run", "--run-dir", tmp_path / "r", "-c", tmp_path / "c.yaml"), "no valid YAML")
    assert not (tmp_path / "x").exists()


def test_unwritable_run_folder(tmp_path):
    (tmp_path / "file").write_text("")
    says(specs("run", "--run-dir", tmp_path / "file/run"), "can't be made", "--run-dir")


def test_two_runs_in_one_folder(tmp_path):
    run = Run(tmp_path / "r", Config())
    says(specs("run", "--run-dir", tmp_path / "r"), "another run is at work")
    run.close()


def folder(tmp_path, train="", test=""):
    d = tmp_path / "data"
    d.mkdir()
    if train is not None:
        (d / "data.jsonl").write_text(train)
    (d / "test.jsonl").write_text(test)
    return d


def test_missing_data(tmp_path):
    says(
        specs("zero", *SMALL, "--run-dir", tmp_path / "r", f"data.source={tmp_path}/nowhere"),
        "nowhere",
        "data.jsonl",
    )


def test_empty_data(tmp_path):
    says(
        specs("zero", *SMALL, "--run-dir", tmp_path / "r", f"data.source={folder(tmp_path)}"),
        "data.jsonl is empty",
    )


def test_data_are_prepared_before_anything_else(tmp_path, monkeypatch, capsys):
    "A test that isn't there, or is the training set, is told before a model is loaded; by the doctor as well"
    import specs_nb.pipeline as p

    monkeypatch.setattr(p, "_prepare", lambda *a, **k: None)
    monkeypatch.setattr(p, "check_training", lambda *a: None)
    monkeypatch.setitem(p.DO, "zero", None)  # what would train
    asked = '{"question": "What is 1 + 1?", "answer": 2}\n'
    d = folder(tmp_path, asked, asked)
    for says in ("test.jsonl are among the training rows", "there is no"):
        for command in (["run", *SMALL], ["doctor"]):
            words = [*command, "--run-dir", str(tmp_path / "r"), f"data.source={d}"]
            assert main([str(w) for w in words]) == 2 and says in capsys.readouterr().err
        (d / "test.jsonl").unlink(missing_ok=True)


def test_unreadable_image(tmp_path):
    d = folder(tmp_path, '{"question": "How many?", "answer": 1, "images": ["a.png"]}\n')
    (d / "a.png").write_text("no image")
    says(
        specs("zero", *SMALL, "--run-dir", tmp_path / "r", f"data.source={d}"),
        "line 1",
        "a.png",
        "can't be read",
    )


def test_model_without_processor(tmp_path):
    from specs_nb.engines.models import load_model

    load_model("tiny")[0].save_pretrained(tmp_path / "bare")
    says(specs("zero", *SMALL, "--run-dir", tmp_path / "r", f"model.path={tmp_path}/bare"), "processor")


def test_no_pairs_keeps_what_was_finished(done, tmp_path):
    import shutil

    run = tmp_path / "r"
    shutil.copytree(done, run)
    says(
        specs("pairs", "--run-dir", run, "pairs.max_new_tokens=2"), "no pair is left", "pairs.max_new_tokens"
    )
    assert (run / "zero/model/model.safetensors").exists() and states(run)["zero"]["state"] == "done"
    assert specs("zero", "--run-dir", run).stdout.count("done before") == 1


def named_keys(values):
    "Dotted keys of a configuration's file; a trainer's are TRL's"
    for section, of in values.items():
        yield section
        for key in of if isinstance(of, dict) else ():
            yield f"{section}.{'start' if key == 'from' else key}"


def test_default_yaml_is_the_default():
    "The same values, and every key is in the file"
    assert load_config("default") == Config()
    in_file = set(named_keys(yaml.safe_load(builtin_configs()["default"].read_text())))
    missing = set(named_keys(asdict(Config()))) - in_file
    assert missing == {"final.start"}, "the final stage is always trained"


def test_every_key_is_described():
    text = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    described = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", prose))))
    for key in named_keys(asdict(Config())):
        last = key.rpartition(".")[2]
        assert {"start": "from"}.get(last, last) in described, key


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert (
        e.value.code == 0 and "examples:" in (out := capsys.readouterr().out) and "specs run -c smoke" in out
    )


@pytest.mark.parametrize(
    "word, said",
    [
        ("final.trainer.num_generations=3", "divisible by num_generations"),
        ("final.trainer.learning_rate=abc", "final.trainer.learning_rate must be a number"),
        ("coldstart.trainer.num_train_epochs=0", "num_train_epochs must be positive"),
        ("eval.max_new_tokens=0", "eval.max_new_tokens must be positive"),
        ("pairs.batch_size=0", "pairs.batch_size must be positive"),
    ],
)
def test_values_of_late_stages_are_checked_before_anything_is_trained(tmp_path, capsys, word, said):
    from specs_nb.pipeline import main

    assert main(["zero", "-c", "smoke", "--run-dir", str(tmp_path / "run"), word]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run/zero").exists()


def test_what_is_there_for_the_cold_start_alone_is_left_out_where_one_is_given(tmp_path, capsys, monkeypatch):
    from specs_nb import pipeline
    from specs_nb.core import Run
    from specs_nb.engines.models import resolve

    ran, there = [], resolve("tiny")

    def made(run, stage, **kw):
        ran.append(stage.dir.name)
        for name in pipeline.OUTPUTS[stage.dir.name]:
            (stage.dir / name).parent.mkdir(parents=True, exist_ok=True)
            (stage.dir / name).write_text("{}")
        return {}

    monkeypatch.setattr(pipeline, "DO", dict.fromkeys(pipeline.STAGES, made))
    for word, want in ((f"coldstart.from={there}", ["coldstart", "final"]), ("seed=1", ["zero", "pairs"])):
        run = Run(tmp_path / word[:4], load_config(None, [word]))
        what = pipeline.run_stages(run, "final")
        assert ran[:2] == want and [s for s in what if what[s] == "not needed"] == (
            ["zero", "pairs"] if "from" in word else []
        )
        run.close()
        ran.clear()
    assert "zero       not needed: coldstart.from gives" in capsys.readouterr().out
    run = Run(tmp_path / "asked", load_config(None, [f"coldstart.from={there}"]))
    assert pipeline.run_stages(run, "zero") and ran == ["zero"], "one that is asked for runs"
    run.close()


@pytest.mark.parametrize("name", ["zero", "coldstart"])
def test_a_stage_can_take_a_model_that_is_there(name, tmp_path):
    from specs_nb.core import Run, Stage
    from specs_nb.engines.models import resolve
    from specs_nb.pipeline import DO, keys

    there = resolve("tiny")
    config, plain = load_config(None, [f"{name}.from={there}"]), load_config(None)
    run = Run(tmp_path / "run", config)
    stage = Stage(run.dir / name, keys(config)[name], ("model/config.json",))
    stage.begin()
    stage.end(**DO[name](run, stage))
    assert stage.done and stage.info["from"] == str(there)
    assert (stage.dir / "model").resolve() == Path(there).resolve()
    changed = {s for s in keys(plain) if keys(plain)[s] != keys(config)[s]}
    assert name in changed and "final" in changed
    run.save_config()
    assert getattr(load_config(run.dir / "config.yaml"), name).start == str(there)
    run.close()
    run = Run(tmp_path / "other", load_config(None, [f"{name}.from=no/such"]))
    with pytest.raises(SpecsError, match=f"{name}.from is no/such"):
        DO[name](run, Stage(run.dir / name, "k"))
    run.close()
