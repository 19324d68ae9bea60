"""The figures of README and docs are those of the recorded results."""

import re

from benchmarks.tables import PAGES, RESULTS, ROOT, SCRIPTS, TABLES, filled


def test_the_tables_of_the_pages_are_the_recorded_ones() -> None:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    assert [filled(text) for text in texts] == texts
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in TABLES)


MEASURED = re.compile(r"\d[\d.,]*\s*(%|(ms|s|seconds?|tokens/s|tokens a second|MiB|GiB|MB|GB/s|percent|times|W|J|joules?|points)\b)")


def test_every_figure_of_the_readme_stands_in_a_table_of_recorded_ones() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- (\w+) -->", text)
    assert {"summary"} <= set(names) <= set(TABLES)
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.DOTALL)
    assert not [found.group() for found in MEASURED.finditer(prose)]
    assert all(MEASURED.search(claim) for claim in ("it takes 3.5 s", "12 % less", "2.1 times as fast", "630 MiB"))


def test_every_script_and_every_record_is_in_an_index() -> None:
    folder = ROOT / "benchmarks"
    scripts = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")} - {"tables"}
    listed = {script.partition(" ")[0] for script, *_ in SCRIPTS}
    assert listed == scripts | {"peers.run"}
    studies = (folder / "studies" / "README.md").read_text(encoding="utf-8")
    records = {path.stem for path in RESULTS.glob("*.json")}
    assert records <= {record for _, _, record, _ in SCRIPTS} | set(re.findall(r"^\| \[?(\w+)", studies, re.MULTILINE))


def test_every_study_says_what_came_of_it() -> None:
    paths = [path for path in (ROOT / "benchmarks" / "studies").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(paths) >= 6
    for path in paths:
        record = f"benchmarks/results/{path.stem}.json"
        for part in ("Question: ", "Verdict: ", "Ran: 20", "at commit ", record, "Command at that commit: "):
            assert part in path.read_text(encoding="utf-8"), f"{path.name} lacks {part!r}"
