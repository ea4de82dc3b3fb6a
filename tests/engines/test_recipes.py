"""Every recipe that ships is walked: its own YAML, a small model in the model's place, all stages from
GRPO-zero to the report. What can't be as shipped on a CPU is listed with its reason in walk_case.STAND_INS"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    pytest.skip(
        "vLLM isn't installed here: `make vllm`, then `python tools/check.py vllm`", allow_module_level=True
    )

from specs_nb.core import builtin_configs, load_config, read_json
from specs_nb.engines.models import is_adapter

HERE = Path(__file__).parent
# these run as they are, embedded model and all: the first in README's figures, both in test_pipeline.py
EMBEDDED = ("default", "smoke")
RECIPES = sorted(set(builtin_configs()) - set(EMBEDDED))


@pytest.fixture(scope="module")
def walked(request, tmp_path_factory):
    "The recipes that are asked for, walked by one process"
    out = tmp_path_factory.mktemp("walk")
    names = [
        i.callspec.params["name"] for i in request.session.items if i.fspath.basename == Path(__file__).name
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    words = [sys.executable, str(HERE / "walk_case.py"), str(out), *dict.fromkeys(names)]
    r = subprocess.run(words, capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stderr[-3000:]
    assert "merged weights" not in r.stdout, "adapters are handed over by themselves"
    return out


def first_bad(values):
    "The first number of a history that is none"
    return next((k for h in values for k, v in h.items() if isinstance(v, float) and math.isinf(v)), None)


def nights(stage):
    """What a training's vLLM is told of two steps and the check after the first: it sleeps from its start,
    after each time it wrote, and gets its weights back before the next. The base under an adapter waits in
    host memory (level 1); whole weights are thrown away (level 2), since the trainer sends all of them"""
    if not stage.trainer.get("vllm_enable_sleep_mode"):
        return []
    sleep = f"sleep {1 if stage.lora or stage.qlora else 2}"
    return [sleep] + ["wake weights", "wake kv_cache", sleep] * 3


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_walked(name, walked):
    facts, run, shipped = read_json(walked / f"{name}.json"), walked / name, load_config(name)
    assert "error" not in facts, facts["trace"]
    assert facts["states"] == dict.fromkeys(("zero", "pairs", "coldstart", "final", "eval", "report"), "done")
    for stage in ("zero", "coldstart", "final"):
        config, history = getattr(shipped, stage), read_json(run / stage / "history.json")
        assert [h["step"] for h in history] == [1, 2] and first_bad(history) is None
        assert is_adapter(run / stage / "model") == (config.lora or config.qlora), stage
        if config.qlora:
            assert read_json(run / stage / "model/base.json")["quantized"]
    metrics = json.loads((run / "eval/metrics.json").read_text())
    assert set(metrics) == {"base", "zero", "coldstart", "final"}
    assert (run / "report.html").exists() and (run / "pairs/pairs.parquet").exists()
    for stage in ("pairs/samples", "eval/samples"):
        assert "vLLM" in (run / stage / "engine.txt").read_text()
    assert facts["sleeps"] == nights(shipped.zero) + nights(shipped.final)
