"""The fast GRPO step gives TRL's numbers: tokens, log-probabilities, loss, gradients; and leaves to TRL what
it can't do."""

import pytest
import torch

from specs_nb import world
from specs_nb.core import GRPOStage
from specs_nb.engines import fast, grouped
from specs_nb.engines.fast import write
from specs_nb.engines.generate import encode
from specs_nb.engines.models import FAMILIES, load_model, random_model
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer

FMT = FORMATS["think_answer"]
# on a GPU TRL's default is true
HOW = dict(
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=12,
    gradient_checkpointing=False,
    bf16=False,
)
torch.backends.cudnn.allow_tf32 = False  # nor are a GPU's convolutions exact as they come


def rows(n, eyes=True):
    return [r if eyes else {**r, "images": []} for r in world.rows("train", n)]


def trainer(tmp_path, start="tiny", eyes=True, stage=None, load=None, **how):
    t = grpo_trainer(
        start,
        rows(8, eyes),
        tmp_path,
        GRPOStage(steps=1, **(stage or {}), trainer={**HOW, **how}),
        FMT,
        **(load or {}),
    )
    t.model.train()
    t.current_gradient_accumulation_steps = t.args.gradient_accumulation_steps
    torch.manual_seed(0)
    return t, t._prepare_inputs(next(iter(t.get_train_dataloader())))


def gradients(t, inputs):
    t.model.zero_grad()
    loss = t._compute_loss(t.model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in t.model.named_parameters() if p.grad is not None}


def same(t, inputs):
    "Loss and gradients with the fast scores and with TRL's"
    assert "group" in inputs
    inputs["advantages"] = torch.linspace(
        -1, 1, len(inputs["advantages"]), device=inputs["advantages"].device
    )
    (a, mine), (b, stock) = gradients(t, inputs), gradients(
        t, {k: v for k, v in inputs.items() if k != "group"}
    )
    assert t._tried == {"writing", "scoring"} and t._why == {"writing": None, "scoring": None}
    assert (
        a == pytest.approx(b, abs=1e-6)
        and mine.keys() == stock.keys()
        and any(g.any() for g in stock.values())
    )
    most = max(g.norm() for g in stock.values())
    for n, g in stock.items():
        assert (mine[n] - g).norm() <= 1e-4 * g.norm() + 1e-6 * most, n


@pytest.mark.parametrize("stage", [{}, {"lora": True, "lora_rank": 4}], ids=["full", "lora"])
def test_loss_and_gradients(stage, tmp_path):
    same(*trainer(tmp_path, stage=stage))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "internvl"])
def test_every_family(family, tmp_path):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    same(*trainer(tmp_path, random_model(family, tmp_path / family), family != "text"))


def test_images_in_tiles_are_written_by_trl(tmp_path, capsys):
    t, inputs = trainer(tmp_path, random_model("internvl", tmp_path / "internvl"))
    assert (
        capsys.readouterr().out.count("it isn't clear to which prompt the rows belong in pixel_values") == 1
    )
    assert gradients(t, inputs)[1] and t._tried == {"scoring"}


@pytest.mark.parametrize("how", [{"dtype": "bfloat16"}, {"bf16": True}], ids=["bfloat16", "autocast"])
def test_precisions(how, tmp_path):
    "In 16 bits the numbers differ by their rounding, and the fast way is still taken"
    load = {k: v for k, v in how.items() if k == "dtype"}
    more = {k: v for k, v in how.items() if k != "dtype"}
    t, inputs = trainer(tmp_path, load=load, learning_rate=1e-3, **more)  # 1e-6 would move nothing in 16 bits
    assert gradients(t, inputs)[1] and t._tried == {"writing", "scoring"}


def test_questions_with_and_without_pictures_in_one_batch(tmp_path, monkeypatch):
    "TRL says None of a text row, and the processor looks for a picture in it"
    some = [{**r, "images": r["images"] if i % 2 else []} for i, r in enumerate(rows(8))]
    monkeypatch.setattr(world, "rows", lambda split, n: some)
    quick, inputs = trainer(tmp_path / "fast", per_device_train_batch_size=24)
    assert set(inputs["num_images"]) == {0, 1}
    same(quick, inputs)
    stock, others = trainer(tmp_path / "stock", stage={"fast": False}, per_device_train_batch_size=24)
    assert sorted(others["num_images"]) == sorted(inputs["num_images"])


def test_groups_divided_over_batches(tmp_path):
    "A shuffled generation batch that is used in two parts, each with rows of all groups"
    same(
        *trainer(
            tmp_path, per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=2
        )
    )


def test_a_batch_without_pictures_after_one_with(monkeypatch):
    "Qwen2.5-VL keeps the last batch's positions in itself; they must not reach the next one"
    from specs_nb import generate as g

    model, processor = load_model("tiny")
    how, asks = g.Sampling(temperature=0.0, max_new_tokens=24), [FMT.instruction] * 4
    ids = lambda: [c.ids for (c,) in g.draw_completions(model, processor, rows(4, eyes=False), asks, how)]
    g.draw_completions(model, processor, rows(4), asks, how)
    mine = ids()
    monkeypatch.setattr(g, "_writes", {(model.config.model_type, model.dtype): False})
    assert mine == ids(), "as generate has it"


def test_greedy_answers_are_generates():
    model, processor = load_model("tiny")
    asked = rows(3)
    # prompts of different length
    inputs = encode(processor, asked, [FMT.instruction + " Be brief." * i for i in range(3)]).to(model.device)
    ids, logps = write(model, inputs, 2, 40, [processor.tokenizer.eos_token_id], temperature=0)
    theirs = model.generate(**inputs, do_sample=False, max_new_tokens=40)[
        :, inputs["input_ids"].shape[1] :
    ].tolist()
    assert len({len(i) for i in ids}) > 1, "answers end at different times, so that some left the batch early"
    for i, mine in enumerate(ids):
        assert mine == theirs[i // 2][: len(mine)] and (
            len(mine) == 40 or mine[-1] == processor.tokenizer.eos_token_id
        )


def test_drawn_as_the_model_says():
    "Frequencies of the first token against its probabilities, at a temperature, with one token never written"
    model, processor = load_model("tiny")
    inputs, n = encode(processor, rows(1), [FMT.instruction]).to(model.device), 4000
    with torch.no_grad():
        p = (model(**inputs).logits[0, -1] / 2).softmax(-1).cpu()
    never = int(p.argmax())
    torch.manual_seed(0)
    ids, logps = write(model, inputs, n, 1, [0], temperature=2.0, suppress=[never])
    drawn = torch.tensor([i[0] for i in ids])
    assert torch.allclose(torch.tensor([l[0] for l in logps]), p[drawn].log(), atol=1e-4)
    p[never] = 0
    p = p / p.sum()
    assert (
        (drawn.bincount(minlength=len(p)) - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 3
    ).all() and not (drawn == never).any()


def test_left_to_trl_and_said(tmp_path, capsys, monkeypatch):
    t, inputs = trainer(tmp_path, top_k=5, stage={"lora": True, "lora_dropout": 0.1})
    said = capsys.readouterr().out
    assert "writing of answers is left to TRL" in said and "scoring of answers is left to TRL" in said
    assert "group" not in inputs
    # a model that counts otherwise than we thought
    counted, asked = fast.positions, grouped.prompt_positions
    monkeypatch.setattr(fast, "positions", lambda *args: counted(*args) + 3)
    monkeypatch.setattr(grouped, "prompt_positions", lambda *args: asked(*args) * 2)
    t, inputs = trainer(tmp_path)
    assert gradients(t, inputs)[1] and not t._tried
    assert capsys.readouterr().out.count("from TRL's own, more than") == 2


def test_switched_off(tmp_path):
    assert (
        type(grpo_trainer("tiny", rows(8), tmp_path, GRPOStage(fast=False, trainer=HOW), FMT)).__name__
        == "GRPOTrainer"
    )


@pytest.mark.parametrize("quick", [True, False], ids=["fast", "stock"])
def test_each_picture_is_read_once_a_step(quick, tmp_path, monkeypatch):
    "TRL alone decodes micro x accumulation^2 of them; all answers to a question share one"
    from datasets import Image

    decoded, stock = [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *a, **kw: decoded.append(1) or stock(*a, **kw))
    how = {
        **HOW,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_completion_length": 4,
    }
    t = grpo_trainer("tiny", rows(8), tmp_path, GRPOStage(steps=1, fast=quick, trainer=how), FMT)
    seen = []
    decoded.clear()  # prompts were counted
    t.reward_funcs[0] = lambda completions, images, **kw: seen.extend(images) or [0.0] * len(completions)
    t.train()
    assert len(seen) == 8 and len({id(p) for (p,) in seen}) == 2 == len(decoded)


def test_a_prompt_beyond_the_context_is_left_out(tmp_path, capsys):
    "Alone it would train on positions the model doesn't know; the same one is left out at each start"
    long = {**world.rows("train", 9)[8], "id": "a long one", "question": "How many? " * 3000}
    for _ in range(2):
        t = grpo_trainer("tiny", [long, *rows(8)], tmp_path, GRPOStage(steps=1, trainer=HOW), FMT)
        assert len(t.train_dataset) == 8 and "a long one" not in t.table.dataset["id"]
        assert "1 of 9 prompts are longer than the 2036 tokens" in capsys.readouterr().out


def test_a_pair_beyond_the_context_is_left_out(capsys):
    from datasets import Dataset

    from specs_nb.coldstart import fitting_pairs

    says = lambda n: [{"role": "assistant", "content": "red " * n}]
    ask = [{"role": "user", "content": "Which?"}]
    pairs = [dict(prompt=ask, images=[], chosen=says(2), rejected=says(n)) for n in (3, 4000)]
    assert len(fitting_pairs(Dataset.from_list(pairs), *load_model("tiny"))) == 1
    assert "coldstart: 1 of 2 pairs are longer" in capsys.readouterr().out
