"""Every recipe that ships is walked: its own YAML, a small model in the model's place, all stages from
GRPO-zero to the report. What can't be as shipped on a CPU is listed with its reason in walk_case.STAND_INS"""

import json
import math
import os
import socket
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
    with socket.socket() as s:  # TRL's own choice, 29500, may be taken
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    words = [sys.executable, str(HERE / "walk_case.py"), str(out), *dict.fromkeys(names)]
    r = subprocess.run(words, capture_output=True, text=True, env={**env, "MASTER_ADDR": "127.0.0.1"})
    assert r.returncode == 0, r.stderr[-3000:]
    return out


def first_bad(values):
    "The first number of a history that is none"
    return next((k for h in values for k, v in h.items() if isinstance(v, float) and math.isinf(v)), None)


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
    # asleep after each batch that was written, and given its weights again before the next
    slept = [s for s in facts["sleeps"] if s.startswith("sleep")]
    assert set(slept) == {"sleep 2"} and len(slept) >= 2 * (1 + 2)
    assert facts["sleeps"].count("wake weights") >= 4 and facts["sleeps"].count("wake kv_cache") >= 4
