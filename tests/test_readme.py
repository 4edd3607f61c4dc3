"""The README names files, recipes and programs that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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
