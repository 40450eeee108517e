"""The pages that a user reads, README.md and docs/*.md: their code blocks, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]

FENCE = re.compile(r"^```(\w*)$")
NOT_RUN = re.compile(r"^<!-- not run: (.+) -->$")


def locate(path: str) -> Path | None:
    """The file or folder that a page names, from the top of the repository; None where there is none."""
    return REPO / path if (REPO / path).exists() else None


@dataclass(frozen=True)
class Block:
    """A fenced block.

    page, line: where it starts. language: what the fence names. reason: why it is not run, None for one that is.
    output: what the page says that it prints, the `text` block right after it; None where there is none.
    """

    page: Path
    line: int
    language: str
    code: str
    reason: str | None
    output: str | None

    @property
    def name(self) -> str:
        return f"{self.page.stem}-{self.line}"


def fenced(text: str) -> list[tuple[int, str, str, str]]:
    """(line of the fence, language, content, the line that is not empty before it) of every fenced block."""
    found, start, before = [], None, ""
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if fence and start is None:
            start, language, content = number, fence[1], []
        elif fence:
            found.append((start, language, "\n".join(content) + "\n", before))
            start, before = None, "```"
        elif start is not None:
            content.append(line)
        elif line.strip():
            before = line.strip()
    assert start is None, f"the block of line {start} does not end"
    return found


def blocks_of(page: Path) -> list[Block]:
    """Every block that is code, with the output that stands right after it."""
    found = fenced(page.read_text(encoding="utf-8"))
    blocks = []
    for (line, language, code, before), after in zip(found, [*found[1:], (0, "", "", "")]):
        if language in ("python", "bash"):
            reason = NOT_RUN.match(before)
            output = after[2] if after[1] == "text" and after[3] == "```" else None
            blocks.append(Block(page, line, language, code, reason and reason[1], output))
    return blocks


def anchors(page: Path) -> set[str]:
    """What `#...` may follow the page's name, as GitHub makes it of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
