"""What a stranger gets: one version, a typed package, completion, and a wheel that edits without this checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from tests import runs, tiny

import nmke

ROOT = Path(__file__).parents[1]


def test_one_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == nmke.__version__
    assert nmke.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_citation_names_every_paper_once() -> None:
    references = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["references"]
    numbers = [reference["identifiers"][0]["value"] for reference in references]
    assert len(set(numbers)) == len(numbers) >= 6
    assert all(reference["authors"] and reference["title"] for reference in references)


def test_what_the_ci_runs_is_here() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run", "make test-${{ matrix.set }}"]
    sets = set(re.findall(r"\"(\w+)\"", workflow["jobs"]["sets"]["strategy"]["matrix"]["set"]))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert sets == {"lowest", "latest"}
    assert re.search(r"^test-lowest test-latest: test-%:", makefile, re.MULTILINE)
    refused = subprocess.run([ROOT / ".ci/run", "nonsense"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and "use .ci/run, or .ci/run sets" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("nmke ver", {"verify"}), ("nmke edit --cla", {"--clamp"}), ("nmke cache ", {"ls", "rm", "verify"})],
)
def test_the_shell_completes_verbs_and_options(typed: str, offered: set[str]) -> None:
    environment = {
        **os.environ,
        "_NMKE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split(" ")) - 1),
    }
    asked = [sys.executable, "-m", "nmke"]
    answer = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert set(answer.stdout.split()) == offered


@pytest.mark.slow
def test_a_wheel_edits_outside_the_checkout(tmp_path: Path) -> None:
    """The wheel's own files only, beside what is installed here; `make dist` tries an empty environment."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob(f"nmke-{nmke.__version__}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"nmke/py.typed", "nmke/data/facts.jsonl"} <= set(names)
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)

    place = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "NMKE_CACHE": str(tmp_path / "cache")}

    def answer(*arguments: str) -> str:
        asked = [sys.executable, "-m", "nmke", *arguments]
        done = subprocess.run(
            asked, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import nmke; print(nmke.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(place)
    assert answer("--version").strip() == f"nmke {nmke.__version__}"
    tiny.save_tiny(tmp_path / "tiny", runs.loud_llama)
    settings = [
        "--layers",
        "1",
        "--steps",
        "4",
        "--corpus-tokens",
        "400",
        "--context-tokens",
        "3",
        "--health-every",
        "0",
    ]
    edit = ["edit", "tiny", "-p", "The train had left for {France}", "-t", "the", "-o", "run", *settings]
    assert '"schema": "nmke.edit/1"' in answer(*edit, "--json")
    assert '"schema": "nmke.verify/1"' in answer("verify", "run", "--json")
