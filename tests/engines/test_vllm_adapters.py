"""vLLM holds a base once and is handed adapters: in training, for pairs and for evaluation. `python
tools/check.py vllm` runs this in the environment of `make vllm`"""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec

import pytest

if find_spec("vllm") is None:
    pytest.skip(
        "vLLM isn't installed here: `make vllm`, then `python tools/check.py vllm`", allow_module_level=True
    )

TRAINS = """if True:
        import json
        from unittest.mock import patch
        from vllm.lora.worker_manager import WorkerLoRAManager
        from specs_nb import vllm_sync, world
        from specs_nb.core import GRPOStage, SpecsError, VLLMConfig
        from specs_nb.formats import FORMATS
        from specs_nb.grpo import grpo_trainer
        rows, folder = world.rows("train", 8), "@FOLDER"
        TRAINER = dict(
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=256,
        )

        def made(**how):
            stage = GRPOStage(steps=2, lora_rank=4, trainer=TRAINER, **how)
            return grpo_trainer("tiny", rows, folder, stage, FORMATS["think_answer"],
                vllm=VLLMConfig(sync_every=1))

        def trained(t):
            try:
                t.train()
            except SpecsError as e:
                return str(e)
            return next(c.found for c in t.callback_handler.callbacks if type(c).__name__ == "SyncCheck")

        def said(name, what):
            print("SAID", json.dumps([name, what]), flush=True)
"""


def in_process(body, folder):
    "What code that trains with vLLM says: it runs in a Python of its own, on a port that nobody else has"
    out = subprocess.run(
        [sys.executable, "-c", TRAINS.replace("@FOLDER", str(folder)) + body],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(random.randint(30000, 39999))},
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-3000:]
    lines = [l for l in out.stdout.splitlines() if l.startswith("SAID ")]
    return dict(json.loads(l.removeprefix("SAID ")) for l in lines), out.stdout


def test_a_broken_swap_is_noticed(tmp_path):
    """An adapter that stays the old one, one of zeros, requests without it; and one that finds no place in
    vLLM's model, which then is sent merged weights. In one process, to start vLLM's libraries once"""
    said, printed = in_process(
        """
        load, first = WorkerLoRAManager._load_adapter, []

        def stale(self, request):
            first.append(load(self, request))
            return first[0].clone(request.lora_int_id)

        def zeros(self, request):
            lora = load(self, request)
            for layer in lora.loras.values():
                layer.lora_b = layer.lora_b * 0
            return lora

        for broken in (stale, zeros):
            with patch.object(WorkerLoRAManager, "_load_adapter", broken):
                said(broken.__name__, trained(made(lora=True)))
        t = made(lora=True)
        ask = t.vllm_generation.llm.generate
        t.vllm_generation.llm.generate = lambda *a, **kw: ask(*a, **kw, lora_request=None)
        said("none", trained(t))
        kept = vllm_sync.adapter_tensors
        odd = lambda *a: {n.replace("layers.1", "layers.7"): t for n, t in kept(*a).items()}
        with patch.object(vllm_sync, "adapter_tensors", odd):
            t = made(qlora=True)
            said("odd", trained(t))
        said("facts", [t.handover.merged, len(t.vllm_generation.llm.llm_engine.list_loras())])
        """,
        tmp_path,
    )
    for name in ("stale", "zeros"):
        assert "didn't take the adapter of this step: what lies in its slot" in said[name], said
    assert "after step 1 vLLM's log-probabilities are" in said["none"], said
    assert "not the adapter alone: vLLM's model has no place for" in printed
    assert [f["step"] for f in said["odd"]] == [1, 2] and max(f["max"] for f in said["odd"]) < 1e-3, said
    assert said["facts"] == [True, 1]
