"A GRPO run on the embedded model that takes seconds, and what tests read from it"

import json

from specs_nb.formats import FORMATS

FMT = FORMATS["think_answer"]
HOW = dict(
    per_device_train_batch_size=8,
    num_generations=4,
    max_completion_length=24,
    gradient_checkpointing=False,
    bf16=False,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    warmup_steps=0,
    save_steps=2,
)


def history(out):
    return json.loads((out / "history.json").read_text())


def weights(folder):
    name = "model.safetensors" if (folder / "model.safetensors").exists() else "adapter_model.safetensors"
    return (folder / name).read_bytes()
