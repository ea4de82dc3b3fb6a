"""Keep the numbers of a run for README.md: save_result.py RUN_FOLDER docs/results/NAME.json
and the tables of a grid for the notebooks: save_result.py GRID_FOLDER docs/results/NAME"""

import shutil
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


def pair_styles(folder, costs):
    "How the answers of each pair begin: arm, seed, first words of chosen and rejected, n"
    import re

    import pandas as pd

    def begins(turns):
        words = re.sub(r"<[^>]*>", " ", turns[-1]["content"]).split()
        return words[0] if words else ""

    rows, columns = [], ["arm", "seed", "chosen", "rejected"]
    for cost in costs[costs.node.str.startswith("pairs")].itertuples():
        (path,) = (folder / "stages" / cost.node).glob("*/pairs.parquet")
        pairs = pd.read_parquet(path, columns=["chosen", "rejected"])
        rows += [(cost.arm, cost.seed, begins(p.chosen), begins(p.rejected)) for p in pairs.itertuples()]
    return pd.DataFrame(rows, columns=columns).groupby(columns, sort=False).size().reset_index(name="n")


def save_grid(folder, out):
    "Copy a grid's tables; its answers, one row a question, are added up by format"
    import pandas as pd

    out.mkdir(parents=True, exist_ok=True)
    for name in ("results.parquet", "history.parquet", "costs.parquet", "claims.json"):
        shutil.copy(folder / name, out / name)
    questions = pd.read_parquet(folder / "questions.parquet")
    counts = ["n", "accuracy_n", "format_n", "strict_n"]
    by = ["arm", "seed", "model", "split", "asked"]
    plain = questions[~questions.deep]
    plain.groupby(by, as_index=False)[counts].sum().to_parquet(out / "formats.parquet", index=False)
    styles = pair_styles(folder, pd.read_parquet(folder / "costs.parquet"))
    styles.to_parquet(out / "pairs.parquet", index=False)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:3])
    if (source / "claims.json").exists():
        save_grid(source, target)
    else:
        write_json(target, result(source))
