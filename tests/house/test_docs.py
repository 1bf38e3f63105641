"""The documentation is complete, fresh, short where it promised to be, and its commands exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import jsonschema
import msgspec
import pytest

from millrace.api.app import build_app
from millrace.cli.session import EXIT_CODES
from millrace.core import errors, spec
from millrace.core.settings import SETTINGS
from millrace.core.spec_errors import parse_spec
from millrace.serve.catalog import Catalog
from millrace.serve.revisions import Directory
from millrace.wiring import open_dispatcher

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs/reference"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")],
    key=lambda path: str(path),
)


def page(name: str) -> str:
    """A page of the reference."""
    return (REFERENCE / name).read_text(encoding="utf-8")


def test_the_references_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/gendocs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("error", errors.all_errors(), ids=lambda error: error.code)
def test_every_error_is_documented(error: type[errors.MillraceError]) -> None:
    assert f"## {error.code}\n" in page("errors.md")
    assert error.default_hint in page("errors.md")
    assert error.__doc__


def test_error_codes_are_unique() -> None:
    codes = [error.code for error in errors.all_errors()]
    assert len(codes) == len(set(codes))


def spec_keys() -> list[tuple[str, str]]:
    """(struct, key) for everything a spec may say."""
    found = []
    for name, struct in vars(spec).items():
        if isinstance(struct, type) and issubclass(struct, spec.Section) and struct is not spec.Section:
            found += [(name, field.name) for field in msgspec.structs.fields(struct)]
    return found


@pytest.mark.parametrize(("struct", "key"), spec_keys())
def test_every_spec_key_is_documented(struct: str, key: str) -> None:
    section = page("spec.md").split(f"\n## {struct}\n", 1)[1].split("\n## ", 1)[0]
    row = next((line for line in section.splitlines() if line.startswith(f"| `{key}` |")), "")
    assert row.rstrip(" |").rpartition("|")[2].strip(), f"{struct}.{key} has no description"


def test_the_published_schema_describes_every_key() -> None:
    schema = json.loads(page("spec.schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$defs"]["Data"]["required"] == ["source", "label"]
    for struct, key in spec_keys():
        assert schema["$defs"][struct]["properties"][key]["description"], f"{struct}.{key}"


def test_every_setting_is_documented() -> None:
    assert [one.name for one in SETTINGS if f"`{one.variable}`" not in page("settings.md")] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [target for target in targets if target and not (path.parent / target).exists()] == []


def shown_commands() -> list[tuple[str, str]]:
    """Every `millrace …` line in a fenced block of a page."""
    found = []
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = [line for line in block.splitlines() if line.startswith("millrace ")]
            found += [(str(path.relative_to(ROOT)), line) for line in lines]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("where", "line"), shown_commands())
def test_shown_commands_exist(where: str, line: str) -> None:
    """The command and each of its options are in the command tree."""
    from millrace.cli.main import cli

    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli, info_name="millrace")
    while words and isinstance(command, click.Group):
        child = command.get_command(context, words[0])
        if child is None:
            break
        command, context = child, click.Context(child, info_name=words.pop(0), parent=context)
    assert command is not cli, f"{where}: no command in {line!r}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    assert unknown == [], f"{where}: {line!r}"


def yaml_pages() -> list[Path]:
    """Pages that show a spec."""
    return [path for path in PAGES if "```yaml" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", yaml_pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_shown_specs_are_valid(path: Path) -> None:
    """The YAML blocks of a page, one after another, are one spec."""
    blocks = re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert parse_spec("".join(blocks), path.name).project


def test_every_error_has_an_exit_code() -> None:
    missing = [error.code for error in errors.all_errors() if error.code not in EXIT_CODES]
    assert missing == []


def test_pages_keep_their_promised_length() -> None:
    def words(name: str) -> int:
        return len((ROOT / name).read_text(encoding="utf-8").split())

    assert words("ARCHITECTURE.md") <= 1000  # two pages
    assert "## Where do I add" in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert words("docs/notes/process-truth.md") <= 900  # one dense page


@pytest.mark.parametrize(
    "question", ["Who writes records", "Who holds which lease", "What dies with what", "digest covers"]
)
def test_process_truth_answers(question: str) -> None:
    headings = re.findall(
        r"^## (.+)$", (ROOT / "docs/notes/process-truth.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert any(question in heading for heading in headings)


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"])
def test_the_house_papers_exist(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) > 60


@pytest.mark.parametrize("path", sorted((ROOT / "docs/adr").glob("*.md")), ids=lambda path: path.stem)
def test_decisions_have_their_form(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# {path.stem[:4]}: ", text)
    assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences"))


def test_nothing_of_one_machine_is_named() -> None:
    """No absolute path of somebody's machine and no registry host in what we publish."""
    published = [*PAGES, ROOT / "Makefile", ROOT / ".ci/run", ROOT / "requirements-dev.lock"]
    pattern = re.compile(r"/(?:work|opt|root)/|file://|--index-url|--find-links")
    found = [str(path.relative_to(ROOT)) for path in published if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "reference/spec/index.html").exists()
    assert (tmp_path / "reference/spec.schema.json").exists()


# --------------------------------------------------------------------------- SECURITY.md


def doors() -> tuple[list[str], list[str]]:
    """The paths of the table of doors, and the tests of the table below it."""
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.split("\n## Doors\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"`(/[^`]*)`", table), re.findall(r"`(tests/[^`]+)`", text)


def test_every_mounted_route_has_a_door_in_the_threat_model(tmp_path: Path) -> None:
    """A route that nobody has thought about is a door too; a door that leads nowhere is none."""
    home = open_dispatcher(str(tmp_path / "home"))
    routes = build_app(home, wants_token=True).routes
    home.close()
    mounted = {one.path for route in routes for one in getattr(route, "_by_path", {"": route}).values()}
    serving = {target.decode() for target in Catalog(Directory(), "0", 0)._routes} - {"/metrics"}
    named, _ = doors()
    assert len(mounted) > 150

    def leads_to(door: str, path: str) -> bool:
        """A door that ends with a digit is MLflow's, which has a route without the slash."""
        return f"{path}/".startswith(door if door[-1] in "/0" else f"{door}/")

    known = [door for door in named if door != "/"]
    assert [
        path for path in sorted(mounted | serving) if path != "/" and not any(leads_to(door, path) for door in known)
    ] == []
    assert [door for door in known if not any(leads_to(door, path) for path in mounted | serving)] == []


def test_the_threat_model_names_tests_that_are_there() -> None:
    _, tests = doors()
    assert len(tests) > 25
    assert [name for name in tests if "def test_" not in (ROOT / name).read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("name", ["security-model", "operations", "compliance"])
def test_what_runs_it_needs_is_on_the_site(name: str) -> None:
    assert f"{name}.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for place in ("index.md", "how-to/index.md"):
        assert f"{name}.md)" in (ROOT / "docs" / place).read_text(encoding="utf-8")
