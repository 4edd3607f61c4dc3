"""Every command of the README, of docs/ and of the recipes' headers runs, with few and short steps.

They run in a copy of the repository, recipes first, so that `runs/mod_lm` is what its recipe made.
`python -m pytest tests/test_documented_commands.py -rP` prints what ran, exit codes and seconds,
and of each command that cannot run here, why.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.compare_commits import shortened
from tests.launch.test_data_conversations import chat_tokenizer
from tests.test_readme import PAGES, ROOT, commands

STEPS = 4
# Words of a page that stand for something, and what stands for it here.
STANDS_FOR = {
    ".venv/bin/python": "python",
    "/path/to/python": sys.executable,
    "path/to/Llama runs/sparse": "llama runs/of_llama",
    "path/to/Mixtral": "mixtral",
    "path/to/model": "llama",
    "--num-heads 12": "--num-heads 6",
    "--num_gpus 8": "--num_gpus 2",
    "recipes/NAME.yaml": "recipes/mod_lm.yaml",
    "runs/NAME": "runs/mod_lm",
    "compare_routing A B": "compare_routing runs/moe_lm runs/xmoe_lm",
    "CHECKPOINT --output FOLDER": "runs/mod_lm --output resharded",
    "COMPARISON.yaml": "compare_isoflop",
}
# Beginnings of commands, and why they do not run.
SUITE, LONG = "the suite itself", "a measurement of many minutes"
CANNOT = {
    r"pip install": "the network; tests/test_installation.py installs what is built",
    r"pre-commit": "the network",
    r"make (test|soak|lint)": SUITE,
    r".*\bpytest": SUITE,
    r".*-m tests\.soak": SUITE,
    r".*benchmarks/": LONG,
    r".*doctor --kernels|.*compile_kernels": "a GPU, or a compiler for minutes; they have tests",
    r"deepspeed --hostfile": "several machines",
    r"python -m launch\.NAME": "stands for any program",
}
# Beginnings of commands, and words that make them short.
SHORT = {
    r"recipes/compare_sprint": "--quick",
    r"recipes/compare_routers": "train.steps=4 train.batch_size=4 checkpoint.every=2",
    r"recipes/compare_isoflop|.*launch\.compare ": (
        "operations=[2e9] seeds=[0] optimum_seeds=[] 'arms={dense: [model.mixture_of_depths=null]}'"
    ),
    r"recipes/compare_": "operations=2e9 seeds=[0]",
    r".*tensorboard\.main": "--inspect",
    r".*launch\.generate|adaptive generate": "--max-tokens=4",
    r".*launch\.evaluate": "--documents=20",
    r".*launch\.train_exit": "--steps=2 --batch-size=2",
    r".*launch\.oracle": "--tokens=2 --beam=2 --exhaustive-up-to=9",
    r".*launch\.quality": "--samples=64 --steps=2",
    r".*launch\.sample": "--steps=2",
    r".*launch\.convert acm": "--distil-steps=1 --gate-steps=1 --batch-size=2 --rows=2",
    r".*launch\.convert duo": "--batch-size=2 --rows=2",
    r".*launch\.convert distillation": "--steps=1 --max-tokens=200",
    r".*launch\.profile|adaptive profile": "--ranks=1 --steps=2",
    r".*launch\.parity --": "--steps=1",
}
# A program named without its words shows its help.
BARE = r"(python -m launch\.(?!doctor)[\w.]+|adaptive train)$"
TRAINS = (
    r"(?!.*(--help|strided))"
    r"(make train|adaptive (train|profile)|recipes/(?!compare)|deepspeed "
    r"|python -m launch\.(start|profile) )"
)
NAMED = r"RECIPE=(\w+)|recipes/(\w+)\.\w+|--config (runs/\S+)"


def written() -> dict[str, str]:
    """Commands and where they are written, those first whose runs others name."""
    found: dict[str, str] = {}
    for script in sorted((ROOT / "recipes").glob("*.sh")):
        (usage,) = re.findall(r"^#   (recipes/\S+)", script.read_text(), re.MULTILINE)
        assert usage == f"recipes/{script.name}", f"the header of {script.name} says {usage}"
        weights = " checkpoint.weights=runs/mod_lm" if script.stem == "sft_lm" else ""
        found[usage + weights] = f"recipes/{script.name}"
    found["recipes/mod_lm.sh model.mixture_of_depths=null output=runs/dense"] = "(a dense run)"
    save = "python -m launch.convert tokenformer save runs/tokenformer_lm weights.safetensors"
    found[save] = "docs/tokenformer.md"
    for page in PAGES:
        if page.name != "data.md":  # tests/launch/test_data_page.py
            for line in commands(page):
                found.setdefault(line, page.relative_to(ROOT).as_posix())
    return found


def short(command: str, output: str) -> str:
    """The command as it runs here; what trains does so in `output`, if its page says nowhere."""
    for word, here in STANDS_FOR.items():
        command = command.replace(word, here)
    if re.match(BARE, command):
        return f"{command} --help"
    words = [added for like, added in SHORT.items() if re.match(like, command)][:1]
    if re.match(TRAINS, command):
        named = re.search(NAMED, command)
        name = next(filter(None, named.groups())) if named else "mod_lm"
        file = Path(name) if name.startswith("runs/") else Path("recipes") / f"{name}.yaml"
        added = shortened(yaml.safe_load(file.read_text()), small=True, steps=STEPS)
        words += [shlex.quote(word) for word in added if word != "monitor.tensorboard=false"]
        words.append("train.move_within=0")  # few rows may leave a layer without a gradient
        in_its_own = command.startswith("recipes/") and " " not in command
        if not (in_its_own or "output=" in command or name.startswith("runs/")):
            words.append(f"output={output}")
        if command.startswith("make"):
            words.append(f"PYTHON={sys.executable}")
    return " ".join([command, *words])


def furnish() -> None:
    """Into the folder of the copy: what the pages name and do not make."""
    rows = [{"text": f"def f{n % 97}(x):\n    return x * {n % 31}\n" * 9} for n in range(400)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for folder in ("corpus", "texts", "home/texts"):
        Path(folder).mkdir(parents=True)
    Path("corpus/a.jsonl").write_text(text)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in "abc"))
    for folder in ("texts", "home/texts"):
        Path(folder, "a.txt").write_text("".join(row["text"] for row in rows))
    zstandard = pytest.importorskip("zstandard")
    Path("web.jsonl.zst").write_bytes(zstandard.compress(text.encode()))
    Path("my_model.py").write_text(
        "from tests.distributed.subjects import FAMILIES\n"
        "def subject():\n    return FAMILIES['mixture_of_experts']\n"
    )
    page = Path("docs/new_method.md").read_text()
    for language, file in (("python", "strided_depth.py"), ("yaml", "strided.yaml")):
        (content,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
        Path(file).write_text(content)
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 257}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained("llama")
    chat_tokenizer(Path("llama"), None)


def run(command: str, output: str) -> tuple[int, float, str]:
    """Exit code, seconds and what was said of a command that runs in this folder."""
    here = Path.cwd()
    environment = {
        **os.environ,
        "HOME": str(here / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(here),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    begun = time.monotonic()
    done = subprocess.run(
        ["bash", "-c", short(command, output)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    return done.returncode, time.monotonic() - begun, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_documented_command_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = shutil.ignore_patterns(".git", ".venv", "runs", "shared", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    monkeypatch.chdir(tmp_path / "copy")
    furnish()
    failed = []
    for number, (command, page) in enumerate(written().items()):
        reason = next((why for like, why in CANNOT.items() if re.match(like, command)), None)
        if reason is not None:
            print(f"| {page} | {command} | not run: {reason} | |")
            continue
        code, seconds, said = run(command, f"runs/{number}")
        print(f"| {page} | {command} | {code} | {seconds:.0f} s |")
        if code != 0:
            failed.append(f"{page}: {command}\nexit code {code}\n{said[-1500:]}")
    assert not failed, "\n\n".join(failed)
