"""The figures of README and docs are those of the recorded results."""

from benchmarks.tables import PAGES, ROOT, TABLES, filled


def test_the_tables_of_the_pages_are_the_recorded_ones():
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in PAGES]
    assert [filled(text) for text in texts] == texts
    assert all(any(f"<!-- {name} -->" in text for text in texts) for name in TABLES)
