"""Bad input ends in one clear line and exit code 2, before any rank starts."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.run.config import from_mapping
from launch.run.errors import BadInput
from launch.run.launcher import count_ranks
from launch.start import main
from tests.distributed.runs import make_loop, tiny_config, write_text
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad-input")
    write_text(folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    return folder


class Refused:
    """Starts a run in this process and returns the one line that it ends with."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd

    def __call__(self, *words: str) -> str:
        self.capfd.readouterr()  # what ranks of other tests said
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(self.folder / "recipe.yaml"), *words])
        out, err = self.capfd.readouterr()
        assert ended.value.code == 2
        # What starts ranks is printed first: nothing was, but what takes long ("reading data …").
        assert all(line.endswith(" …") for line in out.splitlines())
        lines = err.splitlines()
        assert len(lines) == 1, err
        return lines[0]


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return Refused(folder, capfd)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model.dmi=3", "model.dmi: unknown key; did you mean dim?"),
        ("trian.steps=3", "trian: unknown key; did you mean train?"),
        (
            "model.mixture_of_depths.capacty=0.5",
            "model.mixture_of_depths.capacty: unknown key; did you mean capacity?",
        ),
        ("train.steps=many", "train.steps='many': must be a whole number"),
        ("train.learning_rate=fast", "train.learning_rate='fast': must be a number"),
        ("train.steps=2.5", "train.steps=2.5: must be a whole number"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("train.learning_rate=nan", "train.learning_rate=nan: must be a finite number"),
        ("train.learning_rate=.inf", "train.learning_rate=inf: must be a finite number"),
        ("train.learning_rate=1e7", "train.learning_rate=10000000.0: must be at most 1000000.0"),
        ("train.gradient_clip=1e39", "train.gradient_clip=1e+39: must be at most 1e+38"),
        ("train.final_learning_rate=2", "train.final_learning_rate=2.0: must be at most 1"),
        ("train.weight_decay=nan", "train.weight_decay=nan: must be a finite number"),
        ("train.gradient_clip=.inf", "train.gradient_clip=inf: must be a finite number"),
        ("train.beta1=nan", "train.beta1=nan: must be in [0, 1)"),
        ("train.eps=-1", "train.eps=-1.0: must be at least 0"),
        ("train.eps=0", "train.eps=0.0: must be above 0"),
        (
            "train.seed=12345678901234567890123",
            "train.seed=12345678901234567890123: must be at most 9223372036854775807",
        ),
        ("train.steps=12345678901234567890123", "train.steps=12345678901234567890123: must be at"),
        ("monitor.every=12345678901234567890123", "monitor.every=12345678901234567890123: must"),
        ("checkpoint.every=-1", "checkpoint.every=-1: must be at least 0"),
        ("checkpoint.resume=''", "checkpoint.resume='': must be auto, never or a path"),
        ("model.dim=null", "model.dim=null: must be a whole number"),
        ("model=3", "model=3: must be a mapping of keys"),
        ("monitor.on_alarm=cry", "monitor.on_alarm='cry': must be one of 'warn', 'stop'"),
        (
            "model.mixture_of_depths.capacity=0",
            "model.mixture_of_depths.capacity=0.0: must be in (0, 1]",
        ),
        (
            "model.mixture_of_depths.capacity=1.5",
            "model.mixture_of_depths.capacity=1.5: must be in (0, 1]",
        ),
        ("model.num_heads=5", "model.num_heads=5: must divide dim=32"),
        ("model.num_kv_heads=3", "model.num_kv_heads=3: must divide num_heads=4"),
        ("data.path=/nowhere/*.txt", "data.path=/nowhere/*.txt: no such file"),
        ("data.path=", "data.path=: has no value; for null write data.path=null"),
        ("data.path=''", "data.path='': must name a file or folder, or be null"),
        ("output=", "output=: has no value"),
        ("output=/proc/foo/bar", "output=/proc/foo/bar: /proc cannot be written: "),
        ("output=/dev/null", "output=/dev/null: is a file, must be a folder"),
        ("output=/dev/null/run", "output=/dev/null/run: /dev/null is a file, must be a folder"),
        ("output=''", "output='': must name a folder"),
        ("data.seq_len=64", "data.seq_len=64: must be at most model.max_seq_len=32"),
        ("model.vocab_size=100", "model.vocab_size=100: must be at least 256, that of data."),
        ("data.tokenizer=/nowhere", "data.tokenizer=/nowhere: must be bytes or a tokenizer.json"),
        ("train.batch_size=7", "train.batch_size=7: must be a multiple of the 2 data-parallel"),
        ("train.micro_batch_size=3", "train.micro_batch_size=3: must divide 4"),
        ("parallel.tensor=3", "parallel.tensor=3: must divide the 2 ranks; may be 1, 2"),
        ("checkpoint.resume=/nowhere", "/nowhere: does not exist"),
        ("task=:x", "task=:x: cannot be imported: Empty module name"),
        ("model.dim=1000000000", "model: 22,351,744,317 GiB of weights for one rank, must be"),
        ("model.dim=100000000000", "model: is too large to be written down"),
        ("model.dim=9223372036854775808", "model: is too large to be written down"),
        ("model.mixture_of_experts={ffn_dim: 4611686018427387904}", "model: is too large to be"),
        ("model.num_layers=1000000", "model.num_layers=1000000: must be at most 2048"),
        ("data.path=/", "data.path=/: must be a folder of text, not a whole file system"),
        ("train.batch_size=1000000000000", "train.batch_size=1000000000000: must be at most"),
        ("train.steps=true", "train.steps=true: must be a whole number"),
        ("train.eps=false", "train.eps=false: must be a number"),
        ("model.mixture_of_depths.schedule=[true]", "model.mixture_of_depths.schedule[0]=true:"),
        ("model.mixture_of_depths.capacity=.nan", "model.mixture_of_depths.capacity=nan: must be"),
        ("deepspeed.gradient_predivide_factor=.nan", "deepspeed.gradient_predivide_factor=nan: "),
        ("model.mixture_of_depths.schedule=[7]", "model.mixture_of_depths.schedule=[7]: layer 7"),
        ('output="a\\nb"', "output='a\\nb': must hold no control character"),
        (
            "phases=[{name: a, train: {steps: 1}}, {name: a}]",
            "phases: two are called 'a', must have names of their own",
        ),
        (
            "deepspeed={fp16: {enabled: true}, zero_optimization: {stage: 1}}",
            "deepspeed.fp16.enabled=True: needs another device than this cpu; take bf16",
        ),
        (
            "deepspeed.tensor_parallel={autotp_size: 2}",
            "deepspeed.tensor_parallel: must be left out, set parallel.tensor instead",
        ),
        (
            "deepspeed.sequence_parallel_size=2",
            "deepspeed.sequence_parallel_size: must be left out, set parallel.context instead",
        ),
        (
            "deepspeed.expert_parallel={autoep_size: 2}",
            "deepspeed.expert_parallel: must be left out, set parallel.expert instead",
        ),
        ("deepspeed.wandb.enabled=true", "deepspeed.wandb.enabled=True: must be false"),
        ("deepspeed.csv_monitor.enabled=true", "deepspeed.csv_monitor.enabled=True: must be"),
        ("deepspeed.optimizer.type=Muon", "deepspeed.optimizer.type='Muon': must be another"),
        ("task=sing", "task=sing: must be one of language_model, hub_lm, diffusion, "),
        ("steps", "'steps': must be section.key=value"),
        ("--rank=2", "unrecognized arguments: --rank=2"),
        ("--ranks=0", "--ranks=0: must be at least 1"),
        (
            "deepspeed.train_batch_size=99",
            "deepspeed.train_batch_size=99: contradicts 8, which follows from train.batch_size",
        ),
        ("deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0: must be 1, 2 or 3"),
        ("deepspeed.bf16=true", "deepspeed.bf16=True: must be a mapping of keys"),
        ("deepspeed.fp16=null", "deepspeed.fp16=null: must be a mapping of keys"),
        ("deepspeed.zero_optimization=3", "deepspeed.zero_optimization=3: must be a mapping of"),
        ("deepspeed.zero_optimization.stage=7", "deepspeed.zero_optimization.stage=7: must be 0"),
        (
            "deepspeed.zero_optimizaton.stage=1",
            "deepspeed.zero_optimizaton: unknown key; did you mean zero_optimization?",
        ),
        # What is a key of a section only is none of the section's own.
        ("deepspeed.stage=1", "deepspeed.stage: unknown key"),
        (
            "deepspeed.zero_optimization.satge=1",
            "deepspeed.zero_optimization.satge: unknown key; did you mean stage?",
        ),
        (
            "deepspeed.zero_optimization.offload_param={devcie: cpu}",
            "deepspeed.zero_optimization.offload_param.devcie: unknown key; did you mean device?",
        ),
        (
            "deepspeed.zero_optimization.reduce_bucket_size=big",
            "deepspeed.zero_optimization.reduce_bucket_size='big': Input should be a valid",
        ),
        (
            "deepspeed.wandb={enbled: true}",
            "deepspeed.wandb.enbled: unknown key; did you mean enabled?",
        ),
        ("deepspeed.aio=3", "deepspeed.aio=3: must be a mapping of keys"),
        ("deepspeed.amp.enabled=true", "deepspeed.amp: DeepSpeed refuses it: NVIDIA Apex AMP"),
        (
            "deepspeed={fp16: {enabled: true}, bf16: {enabled: true}}",
            "deepspeed: DeepSpeed refuses it: bfloat16 and fp16 modes cannot be simultaneously",
        ),
        (
            "deepspeed.optimizer={type: Adma}",
            "deepspeed.optimizer.type='Adma': must be one of DeepSpeed's or torch.optim's",
        ),
        ("deepspeed.optimizer.type=[Adam]", "deepspeed.optimizer.type=['Adam']: must be one of"),
        (
            "deepspeed.optimizer={type: Adam, parms: {}}",
            "deepspeed.optimizer.parms: unknown key; did you mean params?",
        ),
        ("deepspeed.optimizer={type: Adam, params: 3}", "deepspeed.optimizer.params=3: must be a"),
        ("deepspeed.scheduler={type: WarmupLR}", "deepspeed.scheduler: must be left out"),
        ("phases=[{name: a, train: {stepss: 3}}]", "phase a: train.stepss: unknown key; did you"),
        ("phases[0].train.steps=3", "phases[0].train.steps=3: phases of this run: none"),
    ],
)
def test_one_line_names_the_value_and_the_rule(word: str, line: str, refused: Refused) -> None:
    assert refused(word).startswith(f"error: {line}")


PHASES = (
    "phases=[{name: a, train: {steps: 3}, model: {num_layers: 1}}, {name: b, train: {steps: 4}}]"
)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            [PHASES, "train.steps=10"],
            "train.steps=10: has no effect, phases set it themselves (3 in phases[0] a, "
            "4 in phases[1] b); give phases[0].train.steps=",
        ),
        ([PHASES, "train={steps: 10, batch_size: 8}"], "train.steps=10: has no effect"),
        # The second phase inherits from the first.
        ([PHASES, "model.num_layers=2"], "model.num_layers=2: has no effect, phases set it"),
        (
            [PHASES, "phases[2].train.steps=1"],
            "phases[2].train.steps=1: phases of this run: 0 to 1",
        ),
    ],
)
def test_what_no_phase_leaves_in_force_is_refused(
    words: list[str], line: str, refused: Refused
) -> None:
    assert refused(*words).startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["parallel.tensor=2", "model.num_heads=1", "model.num_kv_heads=1"],
            "model: num_heads=1: must be a multiple of tensor=2; tensor may be 1",
        ),
        (
            ["parallel.context=2", "model.dim=48", "model.num_heads=3", "model.num_kv_heads=3"],
            "model: context=2: must divide the 3 heads of a tensor rank; may be 1, or any with "
            "context_attention=ring",
        ),
        (
            ["parallel.expert=2", "model.mixture_of_experts={num_experts: 3}"],
            "model: num_experts=3: must be a multiple of the expert axis 2; expert may be 1",
        ),
        (
            ["parallel.tensor=2", "model.pattention={tokens: 7}"],
            "model: num_tokens=7: must be a multiple of tensor=2; tensor may be 1",
        ),
        (
            ["parallel.context_attention=star"],
            "parallel.context_attention='star': must be one of 'ulysses', 'ring'",
        ),
    ],
)
def test_what_a_mesh_cannot_split_is_refused_before_any_rank_starts(
    words: list[str], line: str, refused: Refused
) -> None:
    assert refused(*words) == f"error: {line}"


def test_empty_and_short_data_are_refused(folder: Path, refused: Refused) -> None:
    (folder / "empty.txt").write_text("")
    assert "empty.txt: no text in it" in refused(f"data.path={folder / 'empty.txt'}")
    (folder / "short.txt").write_text("some words")
    line = refused(f"data.path={folder / 'short.txt'}")
    assert "tokens in all, must be at least 98 with data.seq_len=32: give more text, or" in line


def test_a_damaged_jsonl_line_is_named(folder: Path, refused: Refused) -> None:
    path = folder / "texts.jsonl"
    path.write_text('{"text": "fine"}\n{"words": "no"}\n')
    line = refused(f"data.path={path}")
    assert line == f"error: {path}:2: must have a string `text` (data.text_field)"


def test_half_a_character_in_a_jsonl_is_named_by_its_line(folder: Path, refused: Refused) -> None:
    path = folder / "halves.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a \\ud83d\\ude00"}\n{"text": "no \\ud800 x"}\n')
    line = refused(f"data.path={path}")
    assert line == (
        f"error: {path}:3: `text` holds \\ud800, half of a surrogate pair: must be Unicode"
    )


def test_files_that_are_not_there_or_not_yaml_or_json(folder: Path, refused: Refused) -> None:
    assert (
        refused("--config", "/nowhere.yaml") == "error: /nowhere.yaml: no such configuration file"
    )
    (folder / "broken.yaml").write_text("train: [")
    assert "broken.yaml: not valid YAML" in refused("--config", str(folder / "broken.yaml"))
    (folder / "broken.json").write_text("{")
    assert "broken.json: not valid JSON" in refused(
        "--deepspeed_config", str(folder / "broken.json")
    )
    (folder / "other.json").write_text(json.dumps({"gradient_clipping": 7.0}))
    line = refused("--deepspeed_config", str(folder / "other.json"))
    assert "deepspeed.gradient_clipping=7.0: contradicts 1.0" in line


def test_a_port_in_use_is_refused(refused: Refused) -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert refused("--port", str(port)).startswith(f"error: --port={port}: Address already in")


def test_more_ranks_than_gpus_are_refused() -> None:
    options = argparse.Namespace(hostfile=None, ranks=8)
    with pytest.raises(BadInput, match=re.escape("--ranks=8: must be at most the 2 GPUs")):
        count_ranks(options, gpus=2)
    options.ranks = None
    assert count_ranks(options, gpus=4) == 4
    assert count_ranks(options, gpus=0) == 2


def save_fresh(config: dict[str, object]) -> None:
    loop = make_loop(from_mapping(config))
    loop.step()
    loop.save()


def test_a_checkpoint_of_another_model_names_the_first_difference(
    folder: Path, refused: Refused
) -> None:
    run_ranks(save_fresh, 1, tiny_config(folder, output=str(folder / "run")), timeout=120)
    line = refused("model.ffn_dim=64")
    assert "is a checkpoint of another model" in line
    assert "layers.0.ffn.gate.weight is [48, 32] in it, [64, 32] in this model" in line
    line = refused("model.mixture_of_depths=null")
    assert "layers.1." in line
    assert "is not in it" in line


def test_the_recipe_passes_the_exit_code_on(folder: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [root / "recipes" / "mod_lm.sh", "model.num_heads=7"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert re.fullmatch(r"error: model.num_heads=7: must divide dim=\d+\n", done.stderr)
