"""The cold start's fast path changes nothing but the time: the same losses, log-probabilities, gradients and
weights as TRL's own"""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch = pytest.importorskip("torch")
from specs_nb import world
from specs_nb.coldstart import LOSSES, coldstart_trainer
from specs_nb.core import ColdStartStage, PairsStage
from specs_nb.engines.models import random_model
from specs_nb.formats import FORMATS
from specs_nb.pairs import distill, read_pairs

# on a GPU TRL's default is true
STEPS = dict(
    per_device_train_batch_size=4,
    max_steps=3,
    gradient_checkpointing=False,
    save_strategy="no",
    weight_decay=0.1,
    bf16=False,
)
torch.backends.cudnn.allow_tf32 = False  # nor are a GPU's convolutions exact as they come


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    out = tmp_path_factory.mktemp("pairs")
    distill(
        "tiny",
        "tiny",
        world.rows("train", 64),
        out,
        PairsStage(n_samples=4, max_pairs=10, alike=0.0),
        FORMATS["think_answer"],
        engine="transformers",  # not vLLM where there is a card: it isn't what is tested
    )
    return read_pairs(out / "pairs.parquet")


def trained(pairs, out, start="tiny", steps=STEPS, **stage):
    "Metrics of each step and the weights after them"
    lora = stage.setdefault("lora", True)
    trainer = coldstart_trainer(
        start,
        pairs,
        out,
        ColdStartStage(trainer={"learning_rate": 1e-3 if lora else 1e-4, **steps}, **stage),
        seed=3,
    )
    trainer.train()
    logs = [{k: float(v) for k, v in h.items()} for h in trainer.state.log_history if "loss" in h]
    return logs, {k: v.clone() for k, v in trainer.model.state_dict().items()}, trainer


def same(a, b, atol=2e-5):
    (logs_a, weights_a, _), (logs_b, weights_b, _) = a, b
    assert len(logs_a) == len(logs_b) > 0
    for x, y in zip(logs_a, logs_b):
        assert x.keys() == y.keys()
        for k in x.keys() & {
            "loss",
            "grad_norm",
            "kl",
            "logps/chosen",
            "logps/rejected",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
        }:
            assert x[k] == pytest.approx(y[k], rel=1e-4, abs=1e-4), k
    assert weights_a.keys() == weights_b.keys()
    assert max((weights_a[k].float() - weights_b[k].float()).abs().max().item() for k in weights_a) < atol


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_fast_and_stock_train_the_same(pairs, tmp_path, loss, lora):
    fast, stock = (trained(pairs, tmp_path / str(f), loss=loss, lora=lora, fast=f) for f in (True, False))
    same(fast, stock)
    assert fast[0][1]["loss"] != fast[0][0]["loss"]
    assert fast[2].ref_model is None or loss == "dpo+kl", "no second model is held"
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins"} <= fast[0][0].keys()


def test_pairs_with_and_without_pictures_train_the_same(pairs, tmp_path):
    mixed = pairs.map(lambda r, i: {**r, "images": r["images"] if i % 2 else []}, with_indices=True)
    assert {len(i) for i in mixed["images"]} == {0, 1}
    fast, stock = (trained(mixed, tmp_path / str(f), fast=f) for f in (True, False))
    same(fast, stock, atol=1e-3)  # Adam makes a whole step of a rounding where a gradient is almost zero


@pytest.mark.parametrize("family", ["qwen3-vl", "internvl", "gemma3", "idefics3", "smolvlm"])
def test_images_are_shared_in_every_family(pairs, tmp_path, family):
    start = random_model(family, tmp_path / "model")
    fast, stock = (
        trained(pairs, tmp_path / str(f), start, {**STEPS, "max_steps": 2}, lora=False, fast=f)
        for f in (True, False)
    )
    same(fast, stock)


def test_encoder_sees_each_image_once(pairs, tmp_path):
    "Half the patches of a batch, gradients of the encoder's weights equal to those of all"
    grads, seen = {}, {}
    for fast in (True, False):
        trainer = coldstart_trainer(
            "tiny", pairs, tmp_path / str(fast), ColdStartStage(lora=False, fast=fast, trainer=STEPS)
        )
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
        visual = trainer.model.model.visual
        visual.register_forward_pre_hook(
            lambda m, args, fast=fast: (seen.setdefault(fast, len(args[0])), None)[1]
        )
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        grads[fast] = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    assert seen[True] * 2 == seen[False]
    for n in grads[True]:
        torch.testing.assert_close(grads[True][n], grads[False][n], rtol=1e-3, atol=1e-5)


def test_reference_is_asked_once_and_found_again(pairs, tmp_path):
    """The stored numbers serve the next start, and only for the same model and pairs; a damaged file is made
    anew"""
    asked = []

    def start(ds=pairs):
        trainer = coldstart_trainer("tiny", ds, tmp_path, ColdStartStage(trainer=STEPS))
        return list(zip(*(trainer.train_dataset[f"ref_{n}_logps"] for n in ("chosen", "rejected"))))

    from trl import DPOTrainer

    ask = DPOTrainer.compute_ref_log_probs
    with pytest.MonkeyPatch.context() as m:
        m.setattr(DPOTrainer, "compute_ref_log_probs", lambda *a: asked.append(1) or ask(*a))
        first = start()
        assert len(asked) == 3 and len(first) == 10, "10 pairs in batches of 4"
        assert start() == first and len(asked) == 3
        path = tmp_path / "reference.json"
        path.write_bytes(path.read_bytes()[:40])
        assert start() == first and len(asked) == 6
        other = start(pairs.select(range(9, -1, -1)))
        assert len(asked) == 9 and other != first
        for a, b in zip(other, first[::-1]):
            assert a == pytest.approx(b, abs=1e-3)


def test_a_moving_reference_is_asked_in_every_step(pairs, tmp_path):
    fast, stock = (
        trained(
            pairs,
            tmp_path / str(f),
            lora=False,
            fast=f,
            steps={**STEPS, "sync_ref_model": True, "ref_model_sync_steps": 1},
        )
        for f in (True, False)
    )
    same(fast, stock)
    assert fast[2].ref_model is not None and not (tmp_path / "True/reference.json").exists()


def test_no_pair_is_asked_in_vain(pairs, tmp_path):
    "Two steps of 4 see 8 of 10 pairs: asking for all beforehand would cost more than it saves"
    fast, stock = (
        trained(pairs, tmp_path / str(f), fast=f, steps={**STEPS, "max_steps": 2}) for f in (True, False)
    )
    same(fast, stock)
    assert not (tmp_path / "True/reference.json").exists()
