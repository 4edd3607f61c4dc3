"""The README names files, recipes and programs that exist."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from launch.run.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_programs_recipes_and_tests_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (launch(?:\.\w+)+)", text):
        path = ROOT / (module.replace(".", "/") + ".py")
        assert "NAME" in module or path.exists(), f"{page.name} runs {module}"
    for name in re.findall(r"(?:benchmarks|recipes|launch|tests)/[\w/]+\.(?:py|sh|yaml)\b", text):
        assert "NAME" in name or (ROOT / name).exists(), f"{page.name} names {name}"
    for recipe in re.findall(r"RECIPE=([a-z]\w+)", text):
        assert (ROOT / "recipes" / f"{recipe}.sh").exists(), f"{page.name} trains {recipe}"
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, f"{page.name} names {test}"


STARTS = (
    r"(\w+=\S+ )*(\S*python |-m (launch|tests)\b|make [a-z]|adaptive (-|[a-z])"
    r"|deepspeed (--|launch)|recipes/\w+\.sh|pip install |pre-commit |pytest\b)"
)
# What stands for nothing that is there.
PLACEHOLDERS = r"\[--.*|section\.key=value|…|--num_gpus N"


def commands(page: Path) -> list[str]:
    """Lines of a page's blocks, and what stands between backquotes, that begin as commands do."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    # What ends one block would begin the next, were only blocks of commands looked for.
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if kind in ("", "bash") for line in block.splitlines()]
    lines += [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    lines += [" ".join(words.split()) for words in re.findall(r"`([^`]+)`", rest)]
    lines = [re.sub(rf"\s+#.*$|{PLACEHOLDERS}", "", line).strip() for line in lines]
    return [line for line in dict.fromkeys(lines) if re.match(STARTS, line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_words_of_every_command_are_understood(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A recipe takes its keys; a program, in an empty folder, misses what the page made before."""
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        first, *words = shlex.split(command)
        recipe = ROOT / "recipes" / f"{Path(first).stem}.yaml"
        if first in ("make", "adaptive") and words[0] == "train":
            named = [word.removeprefix("RECIPE=") for word in words if word.startswith("RECIPE=")]
            recipe = ROOT / "recipes" / f"{[*named, 'mod_lm'][0]}.yaml"
        if recipe.exists():
            if "arms:" not in recipe.read_text(encoding="utf-8"):
                keys = [word for word in words if re.match(r"[a-z][\w.\[\]]*=", word)]
                load_config(recipe, keys)
            continue
        if first == "adaptive":
            program = words[0]
        elif "-m" in words and words[1].startswith("launch."):
            program, words = words[1].removeprefix("launch."), words[1:]
        else:
            continue
        words = words[1:]
        if program == "doctor" or not words or words == ["--help"] or "mod_lm" in words:
            continue  # these would do it
        with pytest.raises(SystemExit, match="2"):
            import_module(f"launch.{program}").main(words)
        said = capsys.readouterr().err
        missing = (
            r"does not exist|no such|must be a folder with|cannot be imported|must be bytes or"
        )
        assert re.search(missing, said), f"{command}: {said}"
