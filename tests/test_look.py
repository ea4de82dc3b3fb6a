"A look at the base before GRPO: kept, told once, and without effect on the training that follows"

from dataclasses import replace

import pytest

from specs_nb.core import Config, DataConfig, GRPOStage, ModelConfig, Run, SpecsError, read_json
from specs_nb.engines.models import load_model, random_model
from specs_nb.pipeline import run_stages

TRAINER = dict(
    per_device_train_batch_size=4, num_generations=2, max_completion_length=16, save_steps=1, warmup_steps=0
)


def zero_of(folder, **kw):
    stage = GRPOStage(steps=1, lora=True, trainer=TRAINER, **kw)
    config = Config(zero=stage, engine="transformers", workers=1, data=DataConfig(n_train=32, n_test=4))
    return Run(folder, replace(config, report_to="none", samples=0))


def test_training_is_the_same_with_a_look(tmp_path, capsys):
    found = []
    for name, n in (("without", 0), ("with", 8)):
        run = zero_of(tmp_path / name, look=n)
        run_stages(run, "zero")
        run.close()
        found.append(load_model(str(tmp_path / name / "zero/model"))[0].state_dict())
    assert all((found[0][k] == found[1][k]).all() for k in found[0])
    seen = read_json(tmp_path / "with/zero/look.json")
    assert seen["questions"] == 8 and seen["answers"] == 16
    assert "groups with spread" in capsys.readouterr().out
    assert not (tmp_path / "without/zero/look.json").exists()


def test_a_base_that_knows_nothing_stops_before_it_is_trained(tmp_path):
    lost = random_model("qwen2.5-vl", tmp_path / "lost")
    run = zero_of(tmp_path / "run", look=32)
    run.config = replace(run.config, model=ModelConfig(path=lost))
    for _ in range(2):  # the second time it is read, not asked
        with pytest.raises(SpecsError, match="GRPO could learn nothing.*format_parts"):
            run_stages(run, "zero")
    run.close()
    assert read_json(tmp_path / "run/zero/look.json")["answers"] == 64
    assert not (tmp_path / "run/zero/checkpoints").exists()
