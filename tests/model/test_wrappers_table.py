"""docs/wrappers.md and docs/ecosystem.md: every cell of their tables is a test that runs on that class."""

from pathlib import Path

import pytest
import test_adapters
import test_common_suite
import test_compile
import test_distributed
import test_export
import test_forward_rules
import test_hub
import test_loading
import test_sentence_transformers
import test_text_tower
from catalogue import CLASSES, WITH_LOSS

PAGES = Path(__file__).resolve().parents[2] / "docs"


def cases_of(*tests) -> set[str]:
    """Names of the classes that these tests run on, by their parameter `name`."""
    found = []
    for test in tests:
        names = set()
        for mark in test.pytestmark:
            if mark.name == "parametrize" and mark.args[0] == "name":
                names |= {getattr(each, "values", (each,))[0] for each in mark.args[1]}
        found.append({CLASSES[name].model_class.__name__ for name in names if name in CLASSES})
    return set.intersection(*found)


WRAPPERS = {
    "hooks on a tower": cases_of(
        test_forward_rules.test_a_hook_on_a_tower_fires_once_a_pass_and_may_change_what_it_gives
    ),
    "offload of any module": cases_of(
        test_forward_rules.test_weights_that_are_there_during_their_modules_own_pass_alone
    ),
    "DataParallel replica": cases_of(test_forward_rules.test_a_replica_of_data_parallel),
    # As test_every_stem_and_head_trains_in_two_processes asserts.
    "DDP, 2 processes": {CLASSES[name].model_class.__name__ for name in WITH_LOSS},
    "FSDP 2, towers and layers as units": cases_of(
        test_distributed.test_a_class_whose_towers_and_layers_are_sharded_gives_what_it_gives_whole
    ),
    "compile of a tower": cases_of(test_compile.test_a_tower_that_is_compiled_alone_is_what_the_class_runs),
    "compile of the class": cases_of(test_compile.test_a_class_is_one_graph),
    "compile of a training step": cases_of(test_compile.test_a_training_step_is_one_graph),
    "jit.trace, ONNX of it": cases_of(test_export.test_traced, test_export.test_onnx_of_the_trace),
    "torch.export, ONNX, AOTInductor": cases_of(
        test_export.test_exported,
        test_export.test_onnx_of_the_exported_program,
        test_export.test_compiled_ahead_of_time,
    ),
    "PEFT, ten methods": cases_of(test_adapters.test_every_method_on_every_class),
    "transformers' common suite": set(test_common_suite.CASES),
}
LIBRARIES = {
    "Auto class in a new process, on both versions": {
        case.model_class.__name__ for case in test_loading.CASES.values() if case.auto_class
    }
    | {test_text_tower.VitEmbedTextModel.__name__, test_text_tower.VitEmbedTextModelWithProjection.__name__},
    "pushed, its card, pulled by name": {model_class.__name__ for model_class, _, _ in test_hub.REPOS.values()},
    "`pipeline(model=name)`": {test_hub.REPOS[repo][0].__name__ for repo in test_hub.PIPELINES},
    "sentence-transformers": set(test_sentence_transformers.FOLDERS),
    "PEFT, saved and loaded": WRAPPERS["PEFT, ten methods"],
    "ONNX": WRAPPERS["torch.export, ONNX, AOTInductor"],
}
TABLES = {"wrappers.md": WRAPPERS, "ecosystem.md": LIBRARIES}


def table(page: str) -> dict[tuple[str, str], str]:
    """(class, column) -> cell."""
    lines = [line for line in (PAGES / page).read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    header = next(row for row in rows if row[0] == "class")
    rows = [row for row in rows if row[0].startswith("VitEmbed")]
    return {(row[0], column): cell for row in rows for column, cell in zip(header[1:], row[1:], strict=True)}


@pytest.mark.parametrize("page", TABLES)
def test_every_cell_is_a_test(page):
    cells, columns = table(page), TABLES[page]
    assert {column for _, column in cells} == set(columns)
    assert {name for name, _ in cells} == {case.model_class.__name__ for case in CLASSES.values()}
    for (name, column), cell in cells.items():
        assert cell == ("yes" if name in columns[column] else "-"), (name, column)
    assert len(test_adapters.METHODS) == 10, "the header gives the number"
