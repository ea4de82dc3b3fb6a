"Keep the numbers of a run for README.md: save_result.py RUN_FOLDER docs/results/NAME.json"

import sys
from pathlib import Path

from specs_nb.analysis import gf_table
from specs_nb.core import load_config, read_json, write_json
from specs_nb.pipeline import STAGES


def result(run):
    "Metrics, Generalization Factors and costs of a finished run, with seed, date and machine"
    stages = {s: read_json(run / s / "stage.json") for s in STAGES}
    metrics = read_json(run / "eval/metrics.json")
    config = load_config(run / "config.yaml")
    return dict(
        seed=config.seed,
        data_seed=config.data.seed,
        date=stages["eval"]["finished"][:10],
        machine=stages["eval"]["machine"],
        versions=stages["eval"]["versions"],
        stages={s: {k: d[k] for k in ("seconds", "peak_memory_gb")} for s, d in stages.items()},
        pairs={k: stages["pairs"][k] for k in ("pairs", "questions", "verdicts")},
        gf={m: gf_table(metrics, m) for m in ("strict", "format")},
        metrics=metrics,
    )


if __name__ == "__main__":
    write_json(sys.argv[2], result(Path(sys.argv[1])))
