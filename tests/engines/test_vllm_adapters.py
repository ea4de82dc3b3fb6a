"""vLLM holds a base once and is handed adapters: in training, for pairs and for evaluation. `python
tools/check.py vllm` runs this in the environment of `make vllm`"""

import json
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

from specs_nb import generate as g
from specs_nb import world
from specs_nb.formats import FORMATS

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
    "What code that trains with vLLM says: it runs in a Python of its own"
    out = subprocess.run(
        [sys.executable, "-c", TRAINS.replace("@FOLDER", str(folder)) + body],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
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


# ---- one engine for a base and its adapters


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Folders of adapters on the embedded model: two of the language model, one on 4 bits, one of the tower"
    import torch
    from peft import get_peft_model

    from specs_nb.engines.models import load_model, lora_config, save_model

    folder = tmp_path_factory.mktemp("run")

    def made(name, rank, seed, quantize=False, tower=False):
        torch.manual_seed(seed)
        model, processor = load_model("tiny", quantize=quantize)
        adapted = get_peft_model(model, lora_config(rank, tower=tower, model=model))
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.data.normal_(std=0.05)
        save_model(adapted, processor, folder / name / "model")
        return str(folder / name / "model")

    return dict(
        zero=made("zero", 4, 0),
        final=made("final", 12, 1),
        packed=made("packed", 4, 2, quantize=True),
        again=made("again", 4, 3, quantize=True),
        tower=made("tower", 4, 4, tower=True),
    )


def drawn_by(engine, rows):
    how = g.Sampling(temperature=0, max_new_tokens=32, logps=True)
    return engine.sample(rows, [FORMATS["think_answer"].instruction] * len(rows), how, 0)


def test_one_engine_answers_for_all(trained, capsys, monkeypatch):
    """Base, two adapters of different ranks, the first again: greedy tokens and log-probabilities are those
    of the models in transformers, and vLLM starts once; once more for the weights that 4 bits have rounded,
    which two adapters share; and for what must be merged, which is said"""
    rows, starts = world.rows("test", 6), []
    start = g._start_vllm
    monkeypatch.setattr(g, "_start_vllm", lambda *a: (starts.append(a[-1]), start(*a))[1])
    engine = g.VLLM("tiny", {}, {"adapters": list(trained.values())})
    asked = ("tiny", "zero", "final", "zero", "tiny", "packed", "again", "tower")
    seen, expected = [], {}
    for name in asked:
        path = trained.get(name, name)
        engine.take(path)
        ours = drawn_by(engine, rows)
        if name not in expected:
            expected[name] = drawn_by(g.Transformers(path, {}, {}), rows)
        assert [[c.ids for c in d] for d in ours] == [[c.ids for c in d] for d in expected[name]], name
        pairs = zip((c for d in ours for c in d), (c for d in expected[name] for c in d))
        assert max(abs(a - b) for x, y in pairs for a, b in zip(x.logps, y.logps)) < 1e-4, name
        seen.append([c.ids for d in ours for c in d])
    assert starts == [12, 4, 0], "rank 12 and 4 of one base; 4 of the rounded one; merged"
    assert len({str(s) for s in seen}) == 6, "six models, six ways to answer"
    said = capsys.readouterr().out
    assert "tower/model is merged with its base for vLLM: it changes the vision tower" in said
    assert len(list(Path(trained["zero"]).parent.parent.glob("base-4bit-*"))) == 1
    g.end_vllm()


def test_an_adapter_that_vllm_refuses_is_merged(trained, tmp_path, capsys, monkeypatch):
    "A layer without a place in vLLM's model: noticed when the adapter is handed over, and merged"
    monkeypatch.setattr(g, "not_taken", lambda *a: "vLLM's model has no place for it")
    rows = world.rows("test", 2)
    engine = g.VLLM(trained["zero"], {}, {})
    assert [[c.ids for c in d] for d in drawn_by(engine, rows)] == [
        [c.ids for c in d] for d in drawn_by(g.Transformers(trained["zero"], {}, {}), rows)
    ]
    engine.take(trained["zero"])  # as each batch does
    said = capsys.readouterr().out
    assert said.count("is merged with its base for vLLM: vLLM's model has no place for it") == 1
    assert said.count("vLLM starts") == 2
    g.end_vllm()


def test_a_run_with_lora_starts_an_engine_a_stage(tmp_path):
    "GRPO-zero with vLLM beside it; the look, the pairs and the evaluation ask seven models of three engines"
    lora = [f"{stage}.lora=true" for stage in ("zero", "coldstart", "final")]
    out = subprocess.run(
        [
            Path(sys.executable).parent / "specs",
            "run",
            "-c",
            "smoke",
            "--run-dir",
            tmp_path / "run",
            "engine=vllm",
            "zero.trainer.use_vllm=true",
            *lora,
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-3000:]
    starts = [l for l in (out.stdout + out.stderr).splitlines() if "vLLM starts" in l]
    assert ["once, for adapters up to rank 16" in l for l in starts] == [False, True, True], starts
    assert set(json.loads((tmp_path / "run/eval/metrics.json").read_text())) == {
        "base",
        "zero",
        "coldstart",
        "final",
    }
    assert not list((tmp_path / "run").glob("*/merged")), "nothing is merged on the way"
    assert (tmp_path / "run/pairs/pairs.parquet").exists()
    assert "vLLM" in (tmp_path / "run/pairs/samples/engine.txt").read_text()
