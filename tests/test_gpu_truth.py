"bench/gpu_truth.py keeps what a part has found, however the part ends; `make gpu` without a card says so"

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(path):
    "A script of the checkout as a module"
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def truth():
    return script("bench/gpu_truth.py")


def child(code, tmp_path):
    "A part's process, as `begin` makes it"
    found, log = tmp_path / "found.json", tmp_path / "log"
    code = f"import pathlib, time\ninput()\npathlib.Path({str(found)!r}).write_text('{{\"a\": 1}}')\n{code}"
    with log.open("wb") as out:
        streams = dict(stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT)
        p = subprocess.Popen([sys.executable, "-c", code], **streams, start_new_session=True)
    p.found, p.log = found, log
    return p


@pytest.mark.parametrize(
    "code, state", [("", "ok"), ("raise ValueError('no')", "failed"), ("time.sleep(60)", "cut off")]
)
def test_what_was_found_is_kept(truth, code, state, tmp_path):
    p = child(code, tmp_path)
    r = truth.do_part(p, 4 if state == "cut off" else 60)
    assert r["state"] == state
    assert r["found"] == {"a": 1}
    assert p.poll() is not None, "nothing of it is left"
    assert ("ValueError: no" in r["printed"]) == (state == "failed")


def test_parts_by_name_beginning_and_seconds(truth):
    def asked(parts, limit=None):
        return truth.wanted(argparse.Namespace(parts=parts, limit=limit))

    assert asked("tests:30") == {"tests": 30}
    assert list(asked("dpo")) == ["model", "dpo-lora", "dpo-qlora"], "these need the model"
    assert list(asked("write-vllm")) == ["write-vllm"], "a whole name is no beginning"
    assert asked("", 7)["smoke-vllm-lora"] == 7
    assert list(asked(None))[:2] == ["smoke-vllm-lora", "write-vllm"]
    with pytest.raises(SystemExit, match="no part 'smoko'"):
        asked("smoko")


def test_each_part_has_a_function(truth):
    for name in truth.PARTS:
        assert callable(truth.the_part(name)), name


def test_a_line_for_each_end(truth, tmp_path):
    step = dict(write=2.0, train=1.0, whole=3.0)
    line = truth.headline("grpo-vllm-lora", dict(state="ok", seconds=9, found=dict(step=step)))
    assert "step 3.00 s (write 2.00, train 1.00)" in line
    bad = dict(state="failed", seconds=1, found=dict(traceback="Traceback\n  x\nValueError: no"))
    assert truth.headline("dpo-lora", bad).endswith("ValueError: no")
    assert "left out" in truth.headline("tests", dict(state="left out", why="3 s are left"))


def test_the_last_state_of_a_progress_bar_is_kept(truth, tmp_path):
    (tmp_path / "log").write_bytes(b"one\r two\rthree\nfour\n")
    assert truth.tail(tmp_path / "log") == "three\nfour"


def test_every_token_of_a_large_model_has_a_word(truth, tmp_path):
    "And the configuration names the special tokens as the tokenizer numbers them once it is loaded"
    words = dict(tiny=True, pixels=84, dpo_pixels=84, shape="3b")
    a = argparse.Namespace(**words, work=str(tmp_path))
    from specs_nb.engines.models import load_config_of, load_processor

    folder = truth.shape_folder(a)
    truth.fill_vocabulary(folder, 600)
    processor, config = load_processor(str(folder)), load_config_of(str(folder))
    truth.set_special_tokens(config, processor.tokenizer)
    assert config.image_token_id == processor.image_token_id
    assert config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode([520]) == "~520"
    assert None not in processor.tokenizer.convert_ids_to_tokens([*range(500), *range(512, 600)])


def test_what_is_within_counts_once(truth):
    "An outer event's own time is what its inner ones leave"
    ms = 1_000_000
    events = [
        ("inner", 2 * ms, 5 * ms),
        ("outer", 0, 10 * ms),
        ("inner", 6 * ms, 7 * ms),
        ("outer", 10 * ms, 11 * ms),
    ]
    found = truth.totals_by_name(events)
    assert found == {"outer": (2, 11, 7), "inner": (2, 4, 4)}
    assert [r["name"] for r in truth.largest(found, 2, 1)] == ["outer"]


def test_make_gpu_without_a_card(monkeypatch, capsys, tmp_path):
    "It says so and ends well, unless somebody counts on a card"
    check = script("tools/check.py")
    monkeypatch.setattr(check, "card", lambda: "")
    monkeypatch.delenv("SPECS_NEED_GPU", raising=False)
    for part in (check.gpu_tests, check.gpu_cells):
        assert part(tmp_path) == ""
        assert "NOT RUN, torch sees no CUDA card" in capsys.readouterr().out
    monkeypatch.setenv("SPECS_NEED_GPU", "1")
    assert check.gpu_tests(tmp_path) == "there is no CUDA card"
    assert all((ROOT / path).exists() for path in check.GPU_TESTS)


def test_what_a_part_leaves_behind_goes_with_its_row():
    "Folders that notebooks and tests leave for people to look at once filled a disk"
    check, left = script("tools/check.py"), []

    def leaves(tmp):
        code = "import tempfile; print(tempfile.mkdtemp())"
        left.append(Path(check.sh(sys.executable, "-c", code, quiet=True)[1].strip()))
        return "" if left[0].is_dir() else "there is no folder"

    ((_, failed),) = check.in_scratch([leaves])
    assert not failed
    assert not left[0].exists()
