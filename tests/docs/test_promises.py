"""docs/how-tested.md: every promise names tests that exist."""

import re

from pages import REPO

PAGE = (REPO / "docs" / "how-tested.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
# Promises are numbered without a gap; none is dropped unnoticed.
PROMISES = 35


def functions() -> dict[str, set[str]]:
    """{name of a test file: names of the test functions in it}, wherever below tests/ it lies."""
    return {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in (REPO / "tests").rglob("test_*.py")
    }


def test_every_promise_names_tests_that_exist():
    rows = ROW.findall(PAGE)
    assert [int(number) for number, _, _ in rows] == list(range(1, PROMISES + 1))
    known = functions()
    for number, promise, tests in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
        assert named and promise.strip(), number
        for file, function in named:
            assert file in known, f"promise {number}: {file}"
            assert function in known[file], f"promise {number}: {file} has no {function}"
