"""The documents are true: their snippets run, and their tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from segment_durable import config
from segment_durable.testing import Receiver

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    (document.name, number, text)
    for document in DOCUMENTS
    for number, text in enumerate(re.findall(r"^```python\n(.*?)^```$", document.read_text("utf-8"), re.M | re.S))
]

RUN = """
import sys
import segment_durable.config as config
config.DEFAULT_HOST = sys.argv[1]
exec(compile(sys.stdin.read(), sys.argv[2], "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize(("document", "number", "text"), SNIPPETS, ids=lambda value: str(value)[:20])
def test_a_snippet_runs_and_its_events_arrive(
    receiver: Receiver, tmp_path: Path, document: str, number: int, text: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", RUN, receiver.url, f"{document}[{number}]"],
        input=text,
        text=True,
        capture_output=True,
        timeout=60,
        env={config.ENVIRONMENT_DIR: str(tmp_path / "state"), "PATH": "", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    if "host=" not in text:
        calls = len(re.findall(r"\.(?:track|identify|page|screen|group|alias)\(", text))
        assert len(receiver.unique) == calls


def test_the_readme_opens_with_ten_lines_of_code_and_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme.index("import segment_durable as analytics") < readme.index("./scripts/demo")
    assert readme.index("./scripts/demo") < readme.index("./scripts/test") < 2000


def test_every_setting_is_described_with_its_default() -> None:
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    rows: dict[str, str] = {}
    for line in re.findall(r"^\| `.*$", text, re.M):
        names, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        for name in re.findall(r"`(\w+)`", names):
            rows[name] = cells[0] if cells else ""
    for each in fields(config.Config):
        assert each.name in rows, each.name
        if isinstance(each.default, (int, float)):
            shown = rows[each.name].strip("`")
            assert shown == str(each.default) or float(shown) == each.default, each.name


def test_every_module_is_in_the_table_of_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    package = ROOT / "segment_durable"
    for path in package.iterdir():
        if path.suffix in (".py", ".sql"):
            assert f"{path.name}`" in text, path.name
        elif path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text, path.name


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"
