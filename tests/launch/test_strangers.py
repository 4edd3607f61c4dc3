"""What a stranger's checkpoint or configuration says runs nothing and ends in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launch.checkpoint.contents import newest_checkpoint, problem_with_checkpoint
from launch.checkpoint.files import (
    find_checkpoint,
    load_model,
    named_tensors,
    save_tensors,
    write_whole,
)
from launch.checkpoint.state import RunState, WholeState
from launch.convert import METHODS
from launch.run.config import from_mapping, load_config, load_saved
from launch.run.errors import BadInput
from launch.run.plain_data import read_json, read_yaml
from launch.run.trust import UntrustedCode, trust
from launch.tasks.registry import task_class
from parallel.checkpoint import MANIFEST, problem_with, save_atomically
from parallel.mesh import Mesh
from tests.distributed.runs import tiny_config, write_text
from tests.launch.test_program_refusals import PROGRAMS

READERS = [
    "reshard CHECKPOINT --output OUT",
    "grow CHECKPOINT --output OUT --tokens 8",
    "generate CHECKPOINT --prompt a",
    "generate GOOD --draft CHECKPOINT",
    "sample CHECKPOINT --png OUT.png",
    "quality CHECKPOINT --samples 64",
    "oracle CHECKPOINT",
    "train_exit CHECKPOINT",
    "evaluate CHECKPOINT --data RECIPE",
    "compare_routing CHECKPOINT",
    "budget_curve CHECKPOINT model.num_layers=2",
    "compare COMPARISON common=[checkpoint.weights=CHECKPOINT]",
    "convert upcycling CHECKPOINT OUT",
    "convert acm CHECKPOINT --output OUT",
    "convert adapt CHECKPOINT OUT --layers 0",
    "convert duo CHECKPOINT --output OUT",
    "convert distillation CHECKPOINT --output OUT --tokens 8 --ffn_tokens 8",
    "convert to_transformers CHECKPOINT --output OUT",
    "convert tokenformer save CHECKPOINT OUT.safetensors",
    "start --config RECIPE checkpoint.resume=CHECKPOINT",
    "train --config RECIPE checkpoint.resume=CHECKPOINT",
    "profile --config RECIPE checkpoint.resume=CHECKPOINT",
    "start --config RECIPE output=OUT checkpoint.weights=CHECKPOINT",
    "train --config RECIPE output=OUT checkpoint.weights=CHECKPOINT",
]
CONFIGURED = [
    "start --config CHECKPOINT/run.yaml",
    "train --config CHECKPOINT/run.yaml",
    "plan --config CHECKPOINT/run.yaml --gpus 1",
    "profile --config CHECKPOINT/run.yaml",
    "parity --config CHECKPOINT/run.yaml --meshes data=2",
    "profile --config CHECKPOINT/run.yaml",
    "compare COMPARISON recipe=CHECKPOINT/run.yaml",
    "run.finished --config CHECKPOINT/run.yaml",
]
# They read neither a checkpoint nor a configuration.
NO_READERS = {"doctor", "encode"}
# What it reads is a folder of transformers: tests/launch/test_published.py.
NO_READING_METHODS = {"transformers"}


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(autouse=True)
def _nothing_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTIVE_TRUSTED_CODE", "")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    write_text(folder)
    config = from_mapping(tiny_config(folder))
    task = task_class(config.task)(config, mesh=Mesh.single(), device=torch.device("cpu"))
    weights = {n: t.detach() for n, t in named_tensors(task.build_model()).items()}
    moments = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    for step in (2, 3):
        squares = {name: torch.ones_like(tensor) for name, tensor in weights.items()}
        whole = WholeState(weights, moments, squares, RunState(step=step), config)
        root = folder / "run" / "checkpoints"
        save_atomically(root, step, lambda to, whole=whole: write_whole(to, whole))  # type: ignore[misc]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny_config(folder)))
    comparison = {"title": "a", "recipe": "recipe.yaml", "operations": 1e9, "arms": {"a": []}}
    comparison |= {name: str(folder / "compared") for name in ("output", "results")}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(comparison))
    return folder


@pytest.fixture
def words(written: Path, tmp_path: Path) -> dict[str, Path]:
    """What the words in capitals of a command line stand for."""
    return {
        "CHECKPOINT": tmp_path / "run" / "checkpoints" / "step-00000003",
        "GOOD": written / "run",
        "OUT": tmp_path / "out",
        "RECIPE": written / "recipe.yaml",
        "COMPARISON": written / "comparison.yaml",
    }


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A run of two checkpoints, to be damaged."""
    return Path(shutil.copytree(written / "run", tmp_path / "run"))


@pytest.fixture
def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000003"


def sign(checkpoint: Path) -> None:
    """Make the manifest fit what the folder holds now, as a stranger would."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {
        p.relative_to(checkpoint).as_posix(): {
            "bytes": p.stat().st_size,
            "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in checkpoint.rglob("*")
        if p.is_file() and p.name != MANIFEST
    }
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def refused(capsys: pytest.CaptureFixture[str], line: str, *extra: str, **words: Path) -> str:
    """The one line that a program ends in."""
    for name, path in words.items():
        line = line.replace(name, str(path))
    program, *arguments = line.split()
    with pytest.raises(SystemExit) as stop:
        import_module(f"launch.{program}").main([*arguments, *extra])
    said = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2, said
    assert len(said) == 1, said
    return said[0]


@pytest.mark.parametrize("line", READERS)
def test_a_pickle_in_a_checkpoint_is_not_run(
    line: str,
    newest: Path,
    words: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (newest / "engine").mkdir()
    torch.save(Payload(tmp_path / "mark"), newest / "engine" / "mp_rank_00_model_states.pt")
    sign(newest)
    said = refused(capsys, line, **words)
    assert "engine/mp_rank_00_model_states.pt holds posix.mkdir" in said
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_every_program_that_reads_is_given_what_a_stranger_wrote() -> None:
    lines = [line.split() for line in (*READERS, *CONFIGURED)]
    assert {line[0] for line in lines} - {"run.finished"} == set(PROGRAMS) - NO_READERS
    assert {line[1] for line in lines if line[0] == "convert"} == set(METHODS) - NO_READING_METHODS


@pytest.mark.parametrize("line", [*READERS, *CONFIGURED])
def test_code_that_a_checkpoint_names_is_imported_only_when_the_user_says_so(
    line: str,
    newest: Path,
    words: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "code_of_a_stranger"
    (tmp_path / f"{module}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'mark')!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = yaml.safe_load((newest / "run.yaml").read_text()) | {"task": f"{module}:Task"}
    (newest / "run.yaml").write_text(yaml.safe_dump(tree))
    sign(newest)
    said = refused(capsys, line, **words)
    assert f"task={module}:Task: is code that a checkpoint names" in said
    assert not (tmp_path / "mark").exists()
    said = refused(capsys, line, "--trust-code", **words)
    assert "has no attribute 'Task'" in said
    assert (tmp_path / "mark").is_dir()
    sys.modules.pop(module, None)


@pytest.mark.parametrize(
    "line",
    [
        "generate CHECKPOINT --prompt a",
        "reshard CHECKPOINT --output OUT",
        "train --config RECIPE checkpoint.resume=CHECKPOINT output=OUT",
    ],
)
def test_plugins_that_a_checkpoint_names_are_imported_only_when_the_user_says_so(
    line: str,
    newest: Path,
    words: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "plugin_of_a_stranger"
    mark = tmp_path / "mark"
    (tmp_path / f"{module}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = yaml.safe_load((newest / "run.yaml").read_text()) | {"plugins": [module]}
    (newest / "run.yaml").write_text(yaml.safe_dump(tree))
    sign(newest)
    said = refused(capsys, line, **words)
    assert f"plugins={module}: is code that a checkpoint names" in said
    assert not mark.exists()
    sys.modules.pop(module, None)


def test_what_the_users_recipe_names_is_trusted_and_a_runs_own_file_is_not(
    newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "from launch.tasks.language_model import LanguageModelTask as Task\n"
    (tmp_path / "task_of_the_user.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = {"task": "task_of_the_user:Task"}
    tree = yaml.safe_load((newest / "run.yaml").read_text()) | named
    (newest / "run.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UntrustedCode):
        load_config(newest / "run.yaml")
    assert load_config(newest / "run.yaml", ["task=task_of_the_user:Task"]).task == named["task"]
    monkeypatch.setenv("ADAPTIVE_TRUSTED_CODE", "")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(named))
    load_config(tmp_path / "recipe.yaml")
    assert load_saved(newest).task == named["task"]
    trust(["another:Task"])
    with pytest.raises(BadInput, match="another:Task: cannot be imported"):
        task_class("another:Task")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:SECRET_OF_MINE}",
        "a ${oc.env:SECRET_OF_MINE,b} c",
        "${oc.decode:'1'}",
        "${${output}:SECRET_OF_MINE}",
        "${output}${oc.env:SECRET_OF_MINE}",
    ],
)
def test_a_configuration_reads_nothing_of_this_machine(
    text: str, newest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_MINE", "told")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"output": "oc.env", "data": {"path": text}}))
    with pytest.raises(BadInput, match="not a resolver") as refusal:
        load_config(recipe)
    assert "told" not in str(refusal.value)
    # Escaped, it is a string; an override reads the whole again.
    text = text if text.startswith("${${") else text.replace("${oc", "\\${oc")
    recipe.write_text(yaml.safe_dump({"output": "oc.env", "data": {"path": text}}))
    with pytest.raises(BadInput, match="not a resolver"):
        load_config(recipe, ["train.steps=3"])
    text = text.replace("\\", "")
    with pytest.raises(BadInput, match="not a resolver"):
        load_config(None, ["output=oc.env", f"data.path={text}"])
    tree = yaml.safe_load((newest / "run.yaml").read_text())
    tree["data"]["path"] = text
    (newest / "run.yaml").write_text(yaml.safe_dump(tree))
    assert load_saved(newest).data.path == text


def test_a_key_may_still_stand_for_another(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {steps: 7, move_within: '${train.steps}'}")
    assert load_config(tmp_path / "recipe.yaml").train.move_within == 7


_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "a: " + "{a: " * 3000, "a: &a [*a]", _BOMB, "\0", "a: !!python/name:os.system"],
)
def test_yaml_of_any_kind_is_one_line(text: str, newest: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(BadInput, match="not valid YAML"):
        load_config(tmp_path / "recipe.yaml")
    (newest / "run.yaml").write_text(text)
    sign(newest)
    assert_skipped(run, newest, "run.yaml cannot be read")


def test_json_of_any_depth_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    deep, large = "[" * 100 + "]" * 100, " " * (1 << 25)
    for text in ("[" * 100_000, deep, large, "{", "\0"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"nested|must have at most|Expecting"):
            read_json(path)
    path.write_text("a: 1")
    assert read_yaml(path, interpolate=True) == {"a": 1}


def assert_skipped(run: Path, newest: Path, why: str) -> None:
    """`auto` takes the older one and says why; without it there is one line."""
    older = newest.with_name("step-00000002")
    with pytest.warns(UserWarning, match=f"skipped, .*{why}"):
        assert newest_checkpoint(run / "checkpoints") == older
    with pytest.raises(BadInput, match=f"is not an intact checkpoint: .*{why}"):
        find_checkpoint(newest)
    shutil.rmtree(older)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(BadInput, match="holds no intact checkpoint"),
    ):
        load_model(run)


def _changed(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _shard(checkpoint: Path) -> Path:
    (checkpoint / "engine").mkdir()
    return checkpoint / "engine" / "mp_rank_00_model_states.pt"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_changed("state.json", later=1), "later: is not of this version"),
        (_changed("state.json", step="3"), "step='3': must be a count"),
        (_changed("state.json", phase=-1), "phase=-1: must be a count"),
        (_changed("state.json", tokens=float("nan")), "tokens=nan"),
        (lambda c: (c / "state.json").write_text('{"step": 3}'), "phase: is missing"),
        (lambda c: (c / "state.json").write_text("[" * 9999), "state.json cannot be read"),
        (lambda c: (c / "state.json").unlink(), "state.json cannot be read"),
        (lambda c: (c / "run.yaml").unlink(), "run.yaml cannot be read"),
        (lambda c: (c / "run.yaml").write_text("later: 1"), "later: unknown key"),
        (lambda c: (c / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (
            lambda c: (c / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little")),
            "model.safetensors cannot be read",
        ),
        (
            lambda c: (c / "optimizer.safetensors").write_bytes(b"\1" + bytes(7) + b"["),
            "optimizer.safetensors cannot be read",
        ),
        (lambda c: shutil.make_archive(str(c / "engine/a"), "zip", c / ".."), "engine/a.zip"),
        (lambda c: _shard(c).write_bytes(b"PK"), "model_states.pt cannot be read"),
        (lambda c: os.mkfifo(_shard(c)), "model_states.pt is no regular file"),
        (lambda c: os.mkfifo(c / "a"), "a is no regular file"),
        (lambda c: _pipe(c / "state.json"), "state.json is no regular file"),
        (lambda c: _pipe(c / MANIFEST), "is no regular file"),
        (
            lambda c: save_tensors({"abc": torch.zeros(1)}, c / "optimizer.safetensors"),
            r"optimizer.safetensors: abc \[1\] is no moment of a weight",
        ),
        (
            lambda c: save_tensors(
                {"exp_avg/embedding.weight": torch.zeros(1)}, c / "optimizer.safetensors"
            ),
            r"exp_avg/embedding.weight \[1\] is no moment of a weight",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_skipped(
    damage: Callable[[Path], Any], why: str, newest: Path, run: Path
) -> None:
    if "a.zip" in why:
        shard = _shard(newest)
        shutil.make_archive(str(shard), "zip", newest, "state.json")
        Path(f"{shard}.zip").rename(shard)
        why = "is compressed"
    else:
        damage(newest)
    if (newest / MANIFEST).is_file():
        sign(newest)
    assert_skipped(run, newest, why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ffn_dim": 10**12}, "layers.0.ffn.gate.weight is"),
        ({"ffn_dim": 10**18}, "model: is too large to be written down"),
        ({}, "holds torch.int64, must hold torch.float32"),
    ],
)
def test_weights_of_another_size_or_kind_take_no_memory(
    change: dict[str, int], why: str, newest: Path
) -> None:
    tree = yaml.safe_load((newest / "run.yaml").read_text())
    tree["model"] |= change
    (newest / "run.yaml").write_text(yaml.safe_dump(tree))
    if not change:
        whole = load_file(newest / "model.safetensors")
        save_tensors({n: t.long() for n, t in whole.items()}, newest / "model.safetensors")
    sign(newest)
    with pytest.raises(BadInput, match=why):
        load_model(newest)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            '{"step": 3, "files": {"state.json": {"byteq": 1, "sha256": "0"}}}',
            "must have its bytes",
        ),
        ('{"step": 3, "files": null}', "must name the files"),
        ('{"step": 3, "files": {}}', "must name the files"),
        ('{"step": 3, "files": {"state.json": null}}', "must have its bytes"),
        ('{"files": {}}', "step=None"),
        ('{"step": 4, "files": {}}', "is not that of step-00000003"),
        ("[]", "must be a mapping"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "cannot be read"),
    ],
)
def test_a_manifest_of_any_content_is_skipped(text: str, why: str, newest: Path, run: Path) -> None:
    (newest / MANIFEST).write_text(text, errors="surrogateescape")
    assert_skipped(run, newest, why)


def test_every_flipped_bit_of_a_manifest_is_found_or_changes_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        (folder / "engine").mkdir()
        (folder / "engine" / "a.pt").write_text("a")

    checkpoint = save_atomically(tmp_path, 3, write)
    path = checkpoint / MANIFEST
    whole = path.read_bytes()
    said = json.loads(whole)
    missed = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        if problem_with(checkpoint) is None and json.loads(flipped) != said:
            missed.append(bytes(flipped))
    assert not missed
    # What was looked at are bits that matter.
    path.write_bytes(whole)
    assert problem_with(checkpoint) is None


@pytest.mark.parametrize("name", ["state.json", "run.yaml", "model.safetensors"])
def test_a_flipped_bit_that_was_signed_ends_in_words(name: str, newest: Path) -> None:
    # Every eighth byte: a damage before the checksum was taken, or a stranger's.
    whole = (newest / name).read_bytes()
    for at in range(0, min(len(whole), 1600), 8):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at // 8 % 8
        (newest / name).write_bytes(flipped)
        sign(newest)
        try:
            problem = problem_with_checkpoint(newest, checksums=False)
        except UntrustedCode:
            continue
        assert problem is None or "\n" not in problem.strip(), problem


def test_a_file_is_no_checkpoint(tmp_path: Path, run: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "run"), "tar", run)
    with pytest.raises(BadInput, match=r"run.tar: is a file, must be the folder of a checkpoint"):
        find_checkpoint(archive)


def test_files_have_the_permissions_of_any_new_file(written: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        whole = load_whole(written)
        folder = save_atomically(tmp_path / "run", 1, lambda to: write_whole(to, whole))
    finally:
        os.umask(before)
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in folder.iterdir()}
    assert set(modes.values()) == {"0o640"}, modes
    assert folder.stat().st_mode & 0o777 == 0o750


def load_whole(written: Path) -> WholeState:
    from launch.checkpoint.files import read_whole

    return read_whole(find_checkpoint(written / "run"))
