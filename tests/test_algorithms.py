"""Each line of docs/configuration.md that names another algorithm reaches TRL, and trains a step."""

import math

import pytest
import torch

from specs_nb import world
from specs_nb.coldstart import coldstart_trainer
from specs_nb.core import load_config
from specs_nb.formats import FORMATS
from specs_nb.grpo import grpo_trainer
from specs_nb.pairs import make_pairs, read_pairs, write_pairs

FMT = FORMATS["think_answer"]
QUICK = [
    "final.steps=1",
    "final.trainer.per_device_train_batch_size=8",
    "final.trainer.num_generations=4",
    "final.trainer.max_completion_length=16",
    "final.trainer.bf16=false",
    "coldstart.trainer.max_steps=1",
    "coldstart.trainer.per_device_train_batch_size=4",
    "coldstart.trainer.bf16=false",
    "coldstart.trainer.logging_steps=1",
]
GSPO = (
    "final.trainer.importance_sampling_level=sequence final.trainer.epsilon=3e-4"
    " final.trainer.epsilon_high=4e-4"
)
# line of the docs → what TRL's trainer must have
GRPO = {
    GSPO: dict(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4),
    "final.trainer.loss_type=cispo final.trainer.epsilon_high=5.0": dict(loss_type="cispo", epsilon_high=5.0),
    "final.trainer.loss_type=dr_grpo final.trainer.scale_rewards=none": dict(
        loss_type="dr_grpo", scale_rewards="none"
    ),
}
# line of the docs → the loss of the first step, where policy and reference are still the same
DPO = {
    "coldstart.loss=dpo coldstart.trainer.loss_type=ipo": 25.0,  # (0 - 1 / (2 β))², β = 0.1
    "coldstart.loss=dpo coldstart.trainer.loss_type=apo_zero": 1.0,  # 1 - σ(0) + σ(0)
    # (1 - 0.1 - 0.1) / (1 - 2 · 0.1) · log 2
    "coldstart.loss=dpo coldstart.trainer.loss_type=robust coldstart.trainer.label_smoothing=0.1": math.log(
        2
    ),
    # our own mixture takes a relative of DPO too: its loss, and λ times SFT's
    "coldstart.loss=dpo+sft coldstart.lam=0 coldstart.trainer.loss_type=[ipo,sft]": 25.0,
}


@pytest.mark.parametrize("line", GRPO)
def test_a_relative_of_grpo_is_a_field_of_the_trainer(line, tmp_path):
    c = load_config(None, [*QUICK, *line.split()])
    t = grpo_trainer("tiny", world.rows("train", 8), tmp_path, c.final, FMT, stage="final")
    for name, value in GRPO[line].items():
        assert getattr(t, name) == value, name
    loss = t.train().training_loss
    assert t.state.global_step == 1 and math.isfinite(loss)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    rows = world.rows("train", 4)
    said = [[(f"So {r['answer']}.", r["answer"])] for r in rows]
    write_pairs(make_pairs(rows, said, said, FMT, ["drop_all_tags"], 4), path)
    return read_pairs(path)


@pytest.mark.parametrize("line", DPO)
def test_a_relative_of_dpo_is_a_field_of_the_trainer(line, pairs, tmp_path):
    c = load_config(None, [*QUICK, *line.split()])
    t = coldstart_trainer("tiny", pairs, tmp_path, c.coldstart)
    torch.manual_seed(0)
    assert t.train().training_loss == pytest.approx(DPO[line], rel=1e-3)


def test_the_docs_have_these_lines():
    from pathlib import Path

    docs = (Path(__file__).parents[1] / "docs/configuration.md").read_text()
    for line in [*GRPO, *list(DPO)[:3]]:
        assert f"`{line}`" in docs, line
