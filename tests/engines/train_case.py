"""What test_vllm.py starts: short trainings by GRPO with vLLM beside them. `train_case.py OUT NAME…` leaves
OUT/NAME.json for each.

All go through one process, so that torch, TRL and vLLM are imported once; each ends the vLLM of the one
before it."""

import json
import sys
import traceback
from pathlib import Path
from unittest.mock import patch

import torch

from specs_nb import world
from specs_nb.core import (
    GRPOStage,
    QuestionSampling,
    SpecsError,
    Validation,
    VLLMConfig,
    count_seconds,
    write_json,
)
from specs_nb.engines.generate import score_tokens
from specs_nb.engines.models import load_model
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer, train_grpo

FMT, ROWS = FORMATS["think_answer"], world.rows("train", 16)
# several engines share a card here, and compiling would take longer than all they are asked
EAGER = dict(enforce_eager=True) if torch.cuda.is_available() else {}
GRPO = dict(
    per_device_train_batch_size=16,
    num_generations=8,
    max_completion_length=48,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    gradient_checkpointing=False,
    bf16=False,  # on a GPU TRL's default is true, and vLLM follows
)
BESIDE = dict(use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256)


def layers_under(trainer):
    "The base's weights under an adapter, and how many of them training has moved"
    was = dict(load_model("tiny")[0].named_parameters())
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    base = {
        k.replace("base_model.model.", "").replace("base_layer.", ""): p
        for k, p in named
        if "base_layer.weight" in k
    }
    moved = [k for k, p in base.items() if p.shape == was[k].shape and not (p == was[k]).all()]
    return len(base), len(moved)


def checked(out, **how):
    "Two steps, and a check of vLLM's weights after each"
    stage = GRPOStage(steps=2, trainer={**GRPO, **BESIDE}, **how)
    t = grpo_trainer("tiny", ROWS, out, stage, FMT, vllm=VLLMConfig(sync_every=1, options=EAGER))
    clock = count_seconds()
    t.train()
    spent = clock.turn()
    layers, moved = layers_under(t)
    handed = getattr(t, "handover", None)
    return dict(
        spent=spent,
        found=next(c.found for c in t.callback_handler.callbacks if type(c).__name__ == "SyncCheck"),
        scores_once="scoring" in t._tried and t._why["scoring"] is None,
        layers=layers,
        moved=moved,
        handed=handed and [handed.number, handed.merged],
    )


def gap(trainer, rows, batch):
    """The largest difference between vLLM's log-probability of a token and the trainer's, from the same
    distribution: without the tokens that are never written"""
    model, processor = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    never, most = trainer.vllm_generation.generation_kwargs["logit_bias"], 0.0
    columns = batch["completion_ids"], batch["sampling_per_token_logps"], batch["completion_mask"].bool()
    for row, ids, theirs, some in zip(rows, *columns):
        answer = [[ids[some].tolist()]]
        ours = score_tokens(model, processor, [row], [FMT.instruction], answer, bias=never)[0][0]
        most = max(most, (theirs[some].cpu() - torch.tensor(ours)).abs().max().item())
    return most


def mixed_rows(out):
    "What vLLM writes for rows with pictures and rows without in one batch, before any step"
    mixed = [r if i % 3 else {**r, "images": []} for i, r in enumerate(ROWS)]
    stage = GRPOStage(steps=1, trainer={**GRPO, **BESIDE, "per_device_train_batch_size": 32})
    t = grpo_trainer("tiny", mixed, out, stage, FMT, vllm=VLLMConfig(options=EAGER))
    t.model.train()
    inputs = next(iter(t.get_train_dataloader()))
    rows = [mixed[x["row_number"]] for x in inputs]
    found = gap(t, rows, t._generate_and_score_completions(inputs))
    return dict(gap=found, without=sum(not r["images"] for r in rows), rows=len(rows))


def questions(out):
    "Questions are replaced and held-out ones asked, or not: rows with pictures and without"
    mixed = [r if i % 3 else {**r, "images": []} for i, r in enumerate(ROWS)]
    found = []
    for every in (0, 1):
        stage = GRPOStage(
            steps=2,
            sampling=QuestionSampling(True, 0.1, 2.0),
            validate=Validation(every=every),
            trainer={**GRPO, **BESIDE},
        )
        train_grpo(
            "tiny",
            mixed[:12],
            out / str(every),
            stage,
            FMT,
            vllm=VLLMConfig(sync_every=1, options=EAGER),
            rates={r["id"]: 0.5 for r in mixed},
            held=mixed[12:] if every else None,
        )
        found.append(json.loads((out / str(every) / "history.json").read_text()))
    return found


def refused(out):
    "Why a training stops"
    stage = GRPOStage(steps=2, trainer={**GRPO, **BESIDE})
    try:
        train_grpo("tiny", ROWS, out, stage, FMT, vllm=VLLMConfig(options=EAGER))
    except SpecsError as e:
        return str(e)


def broken_sync(out):
    "The weights don't reach vLLM"
    from trl.generation.vllm_generation import VLLMGeneration

    with patch.object(VLLMGeneration, "sync_weights", lambda self: None):
        return refused(out)


def other_prompts(out):
    "vLLM is sent each token of an image, and puts as many in the place of each"
    from specs_nb.engines import vllm_sync

    with patch.object(vllm_sync, "one_per_image", lambda ids, processor: ids):
        return refused(out)


CASES = dict(
    full=checked,
    lora=lambda out: checked(out, lora=True, lora_rank=4),
    qlora=lambda out: checked(out, qlora=True, lora_rank=4),
    questions=questions,
    mixed_rows=mixed_rows,
    broken_sync=broken_sync,
    other_prompts=other_prompts,
)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for name in sys.argv[2:]:
        try:
            facts = dict(found=CASES[name](out / name))
        except Exception as e:
            facts = dict(error=f"{type(e).__name__}: {e}", trace=traceback.format_exc())
        write_json(out / f"{name}.json", facts)
