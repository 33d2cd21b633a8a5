"""The README is executed: its Python examples run, its commands exist, its tables are those of the records."""

import re
import shlex
from pathlib import Path

import pytest

import bench
import bench_report as report
import depthwise_inline

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_examples_run_in_order(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    examples = blocks("python")
    assert len(examples) >= 3
    namespace = {"__name__": "readme"}
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"README.md, Python example {number}", "exec"), namespace)


@pytest.mark.parametrize(
    "command",
    ["pip install -r requirements.txt && python bench.py", "pip install -r requirements.txt && python -m pytest"],
)
def test_the_two_commands_are_there_to_copy(command):
    assert f"{command}\n" in blocks("sh")


def test_ci_runs_the_test_command():
    assert f"\n{blocks('sh')[1]}" in (ROOT / ".ci" / "run").read_text()


def test_files_and_options_named_exist():
    assert (ROOT / "requirements.txt").is_file()
    for name in set(re.findall(r"`([\w/]+\.(?:py|ipynb|txt|json|h|cuh|cu|cpp)|[\w/]+/)`", TEXT)):
        exists = (ROOT / name).exists() or (ROOT / "kernels" / name).exists()
        assert exists or name.startswith("results/") or name == "kernels/NAME.cuh", name
    parsers = {
        r"python bench\.py": bench.parser(report.load_cases()).format_help(),
        "python -m pytest": (ROOT / "tests" / "conftest.py").read_text(),
        r"python examples/execute\.py": (ROOT / "examples" / "execute.py").read_text(),
    }
    for command, known in parsers.items():
        lines = re.findall(rf"`{command}([^`]*)`", TEXT)
        assert lines, command
        for option in (option for line in lines for option in shlex.split(line) if option.startswith("--")):
            assert re.search(rf"{option}(?![\w-])", known), option


def test_api_table_names_everything_public():
    for name in depthwise_inline.__all__:
        assert f"`{name}" in TEXT or name == "__version__", name


def test_troubleshooting_quotes_messages_that_exist():
    source = re.sub(r'"\s*\n\s*f?"', "", (ROOT / "depthwise_inline.py").read_text())
    section = TEXT.split("## Troubleshooting")[1].split("\n## ")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 10
    for message in messages:
        for part in re.split(r"\.\.\.", message):
            assert part.strip(" ,:;()") in source, message


def test_tables_are_generated_from_the_records():
    generated = report.update_readme(TEXT, report.load_records(), report.load_cases())
    assert generated == TEXT, "run python bench.py --readme"


def test_pages_and_pictures_are_made_from_the_records():
    for record in report.load_records():
        assert report.table_path(record, report.RESULTS).read_text() == report.table(record), "bench.py --readme"
        for name in report.PICTURES if record["rows"] else ():
            picture = report.picture_path(record, name, report.RESULTS).read_text()
            assert report.digest(record) in picture, "run python bench.py --readme"


def test_no_speed_is_claimed_without_a_record():
    if report.load_records():
        pytest.skip("results/ holds a record, from which the tables are generated")
    assert "no speed is claimed" in TEXT
    assert not re.search(r"\d+(\.\d+)?x (faster|PyTorch)", TEXT)
