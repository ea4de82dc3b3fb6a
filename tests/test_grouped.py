"""A question and its answers in one row give TRL's losses and gradients: under gradient checkpointing, with
adapters, in passes of few tokens, by several processes"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specs_nb import world
from specs_nb.core import GRPOStage
from specs_nb.engines.models import random_model
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer

ROOT = Path(__file__).parents[1]
torch.backends.cudnn.allow_tf32 = False


def canned(prompt_ids, *_, **__):
    "Answers of 1 to 13 tokens, as they may come from anywhere"
    draw = torch.Generator().manual_seed(len(prompt_ids))
    lengths = torch.randint(1, 14, (len(prompt_ids),), generator=draw).tolist()
    return [torch.randint(20, 400, (n,), generator=draw).tolist() for n in lengths], None


def trainer(tmp_path, start="tiny", eyes=1.0, stage=None, **how):
    "A trainer and its first batch: 3 questions, 4 answers each; `eyes`: share of questions with pictures"
    rows = world.rows("train", 6)
    rows = [r if i < eyes * 6 else {**r, "images": []} for i, r in enumerate(rows)]
    settings = dict(
        per_device_train_batch_size=12,
        num_generations=4,
        max_completion_length=13,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=False,
    )
    config = GRPOStage(steps=1, **(stage or {}), trainer={**settings, **how})
    t = grpo_trainer(start, rows, tmp_path, config, FORMATS["think_answer"])
    if t.args.gradient_checkpointing:
        t.model.gradient_checkpointing_enable(t.args.gradient_checkpointing_kwargs)
        assert t.model.is_gradient_checkpointing
    t.model.train()
    t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps
    t._generate_single_turn = canned
    torch.manual_seed(0)
    return t, t._prepare_inputs(next(iter(t.get_train_dataloader())))


def gradients(t, inputs):
    t.model.zero_grad()
    loss = t._compute_loss(t.model, inputs)
    t.accelerator.backward(loss)
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def same(t, inputs):
    "Loss and gradients of rows with all answers, and of TRL"
    inputs["advantages"] = torch.linspace(-1, 1, len(inputs["advantages"]))
    loss, mine = gradients(t, inputs)
    assert "group" in inputs and "scoring" in t._tried and t._why["scoring"] is None
    stock_loss, stock = gradients(t, {k: v for k, v in inputs.items() if k != "group"})
    assert loss == pytest.approx(stock_loss, abs=1e-5) and mine.keys() == stock.keys()
    most = max(g.norm() for g in stock.values())
    assert most > 0
    for name, g in stock.items():
        assert (mine[name] - g).norm() <= 1e-4 * g.norm() + 1e-5 * most, name


LORA = {"lora": True, "lora_rank": 4}


@pytest.mark.parametrize(
    "case",
    [("qwen2.5-vl", LORA, 1.0), ("qwen3-vl", {}, 0.5), ("gemma3", LORA, 0.5), ("text", {}, 0.0)],
    ids=lambda c: c[0],
)
def test_under_checkpointing(case, tmp_path):
    "Pictures in all questions, in half of them, in none"
    family, stage, eyes = case
    same(*trainer(tmp_path, random_model(family, tmp_path / family), eyes, stage))


def test_one_piece_after_the_other(tmp_path, monkeypatch):
    "Long pieces are not padded"
    from specs_nb.engines import grouped

    monkeypatch.setattr(grouped, "SHORT", 0)
    same(*trainer(tmp_path))


def qwen2_vl(folder):
    "A model of the family before 2.5, by the processor of the embedded one"
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    from specs_nb.engines.models import resolve

    processor = AutoProcessor.from_pretrained(resolve("tiny"))
    tok = processor.tokenizer
    names = dict(vision_start="<|vision_start|>", vision_end="<|vision_end|>", image="<|image_pad|>")
    ids = {f"{k}_token_id": tok.convert_tokens_to_ids(v) for k, v in names.items()}
    size = processor.image_processor.patch_size
    text = dict(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )
    vision = dict(embed_dim=32, hidden_size=32, depth=1, num_heads=2, patch_size=size)
    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=len(tok) - 1, **ids)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_qwen2_vl(tmp_path):
    same(*trainer(tmp_path, qwen2_vl(tmp_path / "model")))


@pytest.mark.parametrize("loss", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_passes_of_few_tokens(loss, tmp_path):
    "The whole batch's loss and gradient, from passes that hold less than one question"
    t, inputs = trainer(tmp_path, stage={"tokens_per_microbatch": 80}, loss_type=loss)
    passes, score = [], t._score_pass
    t._score_pass = lambda *args: passes.append(len(args[1])) or score(*args)
    same(t, inputs)
    assert len(passes) > 4 and max(passes[1:]) < 12
    assert all(len(v) == 2 for k, v in t._metrics["train"].items() if "clip_ratio" in k or k == "entropy")


def test_reference_and_earlier_policy(tmp_path):
    "What is asked beforehand comes from the same rows"
    how = dict(beta=0.1, steps_per_generation=2, per_device_train_batch_size=6)
    quick, mine = trainer(tmp_path / "fast", stage=LORA, **how)
    stock, theirs = trainer(tmp_path / "stock", stage={**LORA, "fast": False}, **how)
    assert torch.equal(mine["completion_ids"], theirs["completion_ids"])
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert torch.allclose(mine[name], theirs[name], atol=1e-5) and theirs[name].any()
    same(quick, mine)


def test_a_step_keeps_a_questions_answers_together(tmp_path):
    "TRL shuffles them over the batches of a step"
    t, _ = trainer(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert [sorted(b["group"].tolist()) for b in t._buffered_inputs] == [[i] * 4 for i in range(3)]
    lengths = [b["completion_mask"].sum(1).tolist() for b in t._buffered_inputs]
    assert lengths == [sorted(x) for x in lengths]


def test_a_frozen_tower_is_asked_once_a_picture(tmp_path):
    how = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3, num_iterations=2)
    t, _ = trainer(tmp_path, stage={**LORA, "tokens_per_microbatch": 80}, **how)
    tower, seen = t.model.get_base_model().model.visual, []
    tower.register_forward_hook(lambda m, args, kw, out: seen.extend(kw["grid_thw"]), with_kwargs=True)
    t._features.clear()
    for _ in range(2):
        for batch in t._buffered_inputs:
            gradients(t, batch)
    assert len(seen) == 3, "three questions with a picture each"


def test_two_processes(tmp_path):
    "Two gloo processes whose questions are torn apart, in passes, against one and TRL as it is"
    files = []
    for name, command in (
        ("two", ["torchrun", "--nproc_per_node", "2", "--master_port", "29631"]),
        ("one", [sys.executable]),
    ):
        files.append(tmp_path / name)
        subprocess.run(
            [*command, str(ROOT / "tests/grouped_case.py"), str(files[-1])], check=True, cwd=tmp_path
        )
    two, one = (torch.load(f) for f in files)
    assert two["passes"] > 8 and one["passes"] == 0 and one["moved"] > 1e-4
    for a, b in zip(two["logged"], one["logged"]):
        assert a == pytest.approx(b, abs=1e-4), "batches, passes and processes log what TRL logs of one batch"
    for name, w in one["weights"].items():
        assert torch.allclose(two["weights"][name], w, atol=1e-5), name


def test_a_second_copy_of_the_module_is_heard():
    "A reload, or the notebook run in the same process, has rows of its own: attention must look at those"
    import importlib.util

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    from specs_nb.engines import grouped

    spec = importlib.util.find_spec("specs_nb.engines.grouped")
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    before = functions["sdpa"], masks["sdpa"]
    try:
        grouped.teach("sdpa")
        second.teach("sdpa")
        assert functions["sdpa"].grouped is second._rows
        taught = functions["sdpa"]
        second.teach("sdpa")
        assert functions["sdpa"] is taught
    finally:
        functions["sdpa"], masks["sdpa"] = before
