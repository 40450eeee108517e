"""What is learned of every kind of label: losses against torch's, what a folder predicts, runs that stop, processes."""

import ast
import csv
import json
import re
import shutil
from pathlib import Path

import labelled_sets as sets
import numpy as np
import pytest
import tiny
import torch
import train_classification
import training_runs as runs
from catalogue import mostly_heavy
from PIL import Image
from torch.nn import functional as F
from training_runs import run_apart, run_here
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from recipes.classification_losses import TargetLoss, UnitLinear, class_weights
from recipes.classification_metrics import Metrics
from recipes.problems import MULTI, REGRESSION, SINGLE, SOFT, UNKNOWN, Problem
from vit_embed import VitEmbedForImageClassification, VitEmbedModel

STILL = dict.fromkeys(("rotation", "shift", "zoom", "jitter"), 0.0)
# kind -> the data set of it, its flags, and the loss of all rows by torch from logits, targets and the model's spreads
# kind -> how `labelled_sets` colours its pictures
COLOURS = {
    "weighted": sets.SINGLE,
    SINGLE: sets.SINGLE,
    MULTI: sets.MULTI,
    REGRESSION: sets.REGRESSION,
    SOFT: sets.SOFT,
}
SPREADS = torch.tensor([8.0, 8192.0])  # powers of two next to the standard deviations 9.49 and 9493
KINDS = {
    SINGLE: ("tsv_tables", {}, lambda logits, t: F.cross_entropy(logits, t)),
    "weighted": (
        *("tsv_tables", {"class_weights": ["cat=3", "dog=0.5"]}),
        lambda logits, t: F.cross_entropy(logits, t, weight=torch.tensor([1.0, 3, 0.5])),
    ),
    MULTI: ("tags_01", {}, lambda logits, t: F.binary_cross_entropy_with_logits(logits, t)),
    REGRESSION: (
        "two_values",
        {"label_columns": ["width", "price"]},
        lambda logits, t: ((logits - t) / SPREADS).square().mean(),
    ),
    SOFT: ("soft_columns", {}, lambda logits, t: F.cross_entropy(logits, t)),
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trunk")
    tiny.randomised(VitEmbedModel(tiny.vision_config())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(trunk, tmp_path_factory) -> dict[str, dict]:
    """kind -> options of its run, of which the validation split is tested, too."""
    root = tmp_path_factory.mktemp("sets")
    found = {}
    for kind, (name, flags, _) in KINDS.items():
        if not (root / name).exists():
            sets.SETS[name](root / name)
        found[kind] = {
            "dataset": root / name,
            **flags,
            "model_name_or_path": trunk,
            "do_train": True,
            "logging_steps": 1,
        }
        found[kind] |= {"do_eval": True, "do_predict": True, "test_split": "validation", **STILL}
    return found


def targets_of(kind: str) -> list:
    """The targets of training and validation, from what was written."""
    made = {
        SINGLE: lambda row: ["Kuh", "cat", "dog"].index(sets.label_of(row)),
        MULTI: lambda row: [float(name in sets.several_of(row)) for name in sets.NAMES],
        REGRESSION: lambda row: [sets.value_of(row), 1000 * sets.value_of(row)],
        SOFT: sets.shares_of,
    }
    return [torch.tensor([made.get(kind, made[SINGLE])(row) for row in rows]) for rows in (range(12), range(12, 18))]


def logits_of(folder: Path, rows: range, kind: str) -> torch.Tensor:
    """The outputs of a saved folder for the pictures of some rows."""
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [sets.picture(COLOURS[kind], row) for row in rows]
    with torch.no_grad():
        return model(**processor(pictures, return_tensors="pt")).logits


@pytest.fixture(scope="module", params=KINDS)
def unmoved(request, options, tmp_path_factory):
    """(kind, folder) of a step over all rows in batches of 5, 5 and 2 at learning rate 0."""
    folder = tmp_path_factory.mktemp("unmoved")
    sizes = {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3, "per_device_eval_batch_size": 4}
    given = {**options[request.param], **sizes, "max_steps": 1, "learning_rate": 0.0, "output_dir": folder}
    run_here(train_classification, sheets=True, **given)
    return request.param, folder


def test_the_loss_of_a_step_is_that_of_torch(unmoved):
    """Of accumulated batches of 5, 5 and 2 rows, by sums of float32 in another order. Pictures are normalised by kornia
    for training, and by the processor here."""
    kind, folder = unmoved
    formula = KINDS[kind][2]
    train, validation = targets_of(kind)
    expected = formula(logits_of(folder, range(12), kind), train).item()
    assert runs.losses(folder) == [pytest.approx(expected, rel=2e-5)]
    if kind != "weighted":  # evaluated by the weights' mean over training rows
        evaluated = formula(logits_of(folder, range(12, 18), kind), validation).item()
        assert runs.results(folder, "eval")["loss"] == pytest.approx(evaluated, rel=2e-5)


def test_the_predictions_are_those_of_the_folder(unmoved):
    """By row; probabilities are written with 6 digits."""
    kind, folder = unmoved
    logits = logits_of(folder, range(12, 18), kind)
    with (folder / "predictions.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    model_config = json.loads((folder / "config.json").read_text())
    names = list(model_config["id2label"].values())
    table = "val.tsv" if kind in (SINGLE, "weighted") else "validation.csv"
    assert [line[0] for line in lines] == [f"{table}:{number}" for number in range(2, 8)]
    if kind in (MULTI, REGRESSION):
        assert header == ["row", *names] and model_config["problem_type"] == kind
        expected = logits.sigmoid() if kind == MULTI else logits
        np.testing.assert_allclose(np.array([line[1:] for line in lines], float), expected, rtol=1e-5)
    else:
        assert header == ["row", "label", "probability"] and model_config["problem_type"] == SINGLE
        expected = logits.softmax(dim=1).max(dim=1)
        assert [line[1] for line in lines] == [names[place] for place in expected.indices]
        np.testing.assert_allclose([float(line[2]) for line in lines], expected.values, rtol=1e-5)


def test_the_pipeline_says_what_the_predictions_say(unmoved):
    kind, folder = unmoved
    with (folder / "predictions.csv").open(newline="") as file:
        line = next(iter(csv.DictReader(file)))
    classify = pipeline("image-classification", str(folder), trust_remote_code=True)
    answers = {a["label"]: a["score"] for a in classify(sets.picture(COLOURS[kind], 12))}
    said = {line["label"]: float(line["probability"])} if "label" in line else {n: float(line[n]) for n in answers}
    assert {name: answers[name] for name in said} == pytest.approx(said, rel=1e-5)


def test_the_code_of_the_card_says_what_the_predictions_say(unmoved, monkeypatch, tmp_path, capsys):
    kind, folder = unmoved
    with (folder / "predictions.csv").open(newline="") as file:
        line = next(iter(csv.DictReader(file)))
    sets.picture(COLOURS[kind], 12).save(tmp_path / "picture.jpg", "png")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/this/folder", str(folder)), {})
    shown = capsys.readouterr().out.strip().splitlines()[-1]
    if kind == REGRESSION:
        assert ast.literal_eval(shown) == pytest.approx({n: float(line[n]) for n in ("width", "price")}, rel=1e-5)
    elif kind == MULTI:
        assert ast.literal_eval(shown) == [name for name in sets.NAMES if float(line[name]) >= 0.5]
    else:
        assert shown == line["label"]


def test_sheets_are_drawn(unmoved):
    sheet = Image.open(unmoved[1] / "pictures" / "test-000001.png").convert("L")
    assert sheet.width > 800 and len(sheet.getcolors()) > 50


@pytest.mark.parametrize("unmoved", [REGRESSION], indirect=True)
def test_a_new_classifier_of_numbers_predicts_their_mean(unmoved):
    values = np.mean([sets.value_of(row) for row in range(12)])
    logits = logits_of(unmoved[1], range(12, 14), REGRESSION)
    np.testing.assert_allclose(logits, [[values, 1000 * values]] * 2, rtol=1e-6)


# --- training ---


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    more = {"num_train_epochs": 40, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_strategy": "steps"}
    for kind in (MULTI, REGRESSION, SOFT):
        run_here(train_classification, **{**options[kind], **more, "save_steps": 60, "output_dir": root / kind})
    return root


def test_every_kind_is_learned(trained):
    """The training rows: of numbers better than half of their spread, in units of the table."""
    with torch.no_grad():
        for kind in (MULTI, REGRESSION, SOFT):
            logits, (truth, _) = logits_of(trained / kind, range(12), kind), targets_of(kind)
            if kind == REGRESSION:
                assert ((logits - truth).abs().mean(dim=0) < 0.25 * truth.std(dim=0)).all()
            elif kind == MULTI:
                assert ((logits > 0) == (truth > 0.5)).float().mean() > 0.95
            else:
                assert (logits.argmax(dim=1) == truth.argmax(dim=1)).all()


@pytest.mark.parametrize("kind", mostly_heavy([REGRESSION, MULTI, SOFT], REGRESSION))
def test_a_resumed_run_equals_an_unbroken_one(kind, options, trained, tmp_path):
    more = {"num_train_epochs": 40, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "save_strategy": "steps"}
    shutil.copytree(trained / kind / "checkpoint-60", tmp_path / "run" / "checkpoint-60")
    given = {**options[kind], **more, "save_steps": 60, "output_dir": tmp_path / "run", "resume_from_checkpoint": True}
    run_here(train_classification, **given)
    runs.assert_equal_runs(tmp_path / "run", trained / kind)


@pytest.mark.parametrize("mode", mostly_heavy(["lora", "linear"], "lora"))
@pytest.mark.parametrize("kind", [REGRESSION, MULTI])
def test_every_mode_saves_what_it_evaluated(mode, kind, options, trunk, tmp_path):
    """The best of its checkpoints. Float32; lora merges its changes, which rounds."""
    given = {**options[kind], "mode": mode, "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    best = {"metric_for_best_model": "width_mae" if kind == REGRESSION else "micro_f1", "load_best_model_at_end": True}
    best |= {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    run_here(train_classification, **given, **best, output_dir=tmp_path / "run")
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    measured = [e[f"eval_{best['metric_for_best_model']}"] for e in state["log_history"] if "eval_loss" in e]
    assert state["best_metric"] == (min if kind == REGRESSION else max)(measured)
    assert runs.results(tmp_path / "run", "eval")[best["metric_for_best_model"]] == pytest.approx(state["best_metric"])
    logits = logits_of(tmp_path / "run", range(12, 18), kind)
    scores = logits.sigmoid() if kind == MULTI else logits
    with (tmp_path / "run" / "predictions.csv").open(newline="") as file:
        written = np.array([line[1:] for line in list(csv.reader(file))[1:]], float)
    np.testing.assert_allclose(written, scores, rtol=1e-4)
    after = runs.weights(tmp_path / "run")
    assert not [name for name in after if "lora" in name or "spreads" in name]


def test_a_saved_model_of_numbers_goes_on_from_where_it_was(options, trained, tmp_path):
    """Evaluated alone, and trained on at learning rate 0: the same predictions, as the same columns are learned."""
    saved = trained / REGRESSION
    given = {**options[REGRESSION], "model_name_or_path": saved}
    run_here(train_classification, **{**given, "do_train": None}, output_dir=tmp_path / "judged")
    run_here(train_classification, **given, output_dir=tmp_path / "on", max_steps=1, learning_rate=0.0)
    expected = (saved / "predictions.csv").read_text()
    for name in ("judged", "on"):
        assert (tmp_path / name / "predictions.csv").read_text() == expected
        for metric in ("width_mae", "price_rmse", "mean_r2"):
            assert runs.results(tmp_path / name, "eval")[metric] == runs.results(saved, "eval")[metric]


def test_a_classifier_for_other_labels_is_new(options, trained, trunk, tmp_path):
    """Also where it has as many outputs."""
    given = {**options[SOFT], "model_name_or_path": trained / MULTI, "max_steps": 1, "learning_rate": 0.0}
    run_here(train_classification, **given, output_dir=tmp_path / "run")
    old, new = (runs.weights(folder)["classifier.weight"] for folder in (trained / MULTI, tmp_path / "run"))
    assert old.shape == new.shape and not torch.isclose(old, new).any()


@pytest.mark.parametrize("kind", mostly_heavy([*KINDS], "weighted"))
def test_two_processes_train_and_predict_as_one(kind, options, tmp_path):
    """Losses of steps of 4 rows, sums of float32 in another order; six rows to predict, of which one batch is short."""
    for processes in (1, 2):
        sizes = {f"per_device_{part}_batch_size": 4 // processes for part in ("train", "eval")}
        given = {**options[kind], **sizes, "max_steps": 3, "learning_rate": 1e-3}
        run_apart("train_classification", {**given, "output_dir": tmp_path / str(processes)}, processes=processes)
    one, two = tmp_path / "1", tmp_path / "2"
    np.testing.assert_allclose(runs.losses(two), runs.losses(one), rtol=1e-4)
    tables = [list(csv.reader((folder / "predictions.csv").open(newline=""))) for folder in (one, two)]
    assert [line[0] for line in tables[0]] == [line[0] for line in tables[1]]
    np.testing.assert_allclose(*[[float(line[-1]) for line in table[1:]] for table in tables], rtol=1e-3)


def test_unlabelled_pictures_alone(trained, options, tmp_path):
    """A folder of them, a list of paths, and folders of other labels are predicted by a trained folder."""
    for row in range(3):
        sets.save(tmp_path / "new" / f"{row}.png", sets.MULTI, row)
        sets.save(tmp_path / "sorted" / ("my pets", "others")[row % 2] / f"{row}.png", sets.MULTI, row)
    (tmp_path / "new.csv").write_text("path\nnew/1.png\nnew/2.png\n")
    rows_of = {"new": [f"{row}.png" for row in range(3)], "new.csv": ["new.csv:2", "new.csv:3"]}
    rows_of["sorted"] = ["my pets/0.png", "my pets/2.png", "others/1.png"]
    for name, rows in rows_of.items():
        given = {"dataset": tmp_path / name, "model_name_or_path": trained / MULTI, "do_predict": True}
        given["test_split"] = "train" if name == "sorted" else None  # else labelled folders are for training
        run_here(train_classification, sheets=True, **given, output_dir=tmp_path / f"run {name}")
        lines = (tmp_path / f"run {name}" / "predictions.csv").read_text().splitlines()
        assert lines[0] == "row,cat,dog,Kuh" and [line.split(",")[0] for line in lines[1:]] == rows
        assert "accuracy" not in (tmp_path / f"run {name}" / "test_results.json").read_text()


# --- losses, layers and metrics alone ---


def model(**fields: object) -> VitEmbedForImageClassification:
    return VitEmbedForImageClassification(tiny.vision_config(**fields))


def losses_in_parts(kind: str, targets: torch.Tensor, weights=None, spreads=None, smoothing: float = 0.0) -> tuple:
    """The loss of a batch, and the sum of those of its rows in two unequal parts of a step, as Trainer calls it."""
    logits = torch.randn(len(targets), 3, generator=torch.Generator().manual_seed(1))
    problem = Problem(kind, ("a", "b", "c"), ("x",))
    loss = TargetLoss(problem, model(), weights, smoothing, spreads)
    items = (targets != UNKNOWN).sum()
    parts = [loss({"logits": logits[rows]}, targets[rows], items) for rows in (slice(0, 2), slice(2, None))]
    return logits, loss({"logits": logits}, targets), sum(parts)


def test_losses_in_parts():
    weights, labels = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0, 1, 2, 1, UNKNOWN])
    logits, whole, parts = losses_in_parts(SINGLE, labels, weights, smoothing=0.1)
    asked = {"weight": weights, "label_smoothing": 0.1, "reduction": "sum"}
    torch.testing.assert_close(whole, F.cross_entropy(logits, labels, **asked) / 4)
    torch.testing.assert_close(parts, whole)
    replicas = torch.full((2, 1), 4)  # what nn.DataParallel of two gets, whose loss Trainer doubles
    loss = TargetLoss(Problem(SINGLE, ("a", "b", "c"), ("x",)), model(), weights, 0.1)
    torch.testing.assert_close(2 * loss({"logits": logits}, labels, replicas), whole)
    shares = torch.tensor([[0.2, 0.3, 0.5]] * 4 + [[float(UNKNOWN)] * 3])
    logits, whole, parts = losses_in_parts(SOFT, shares, weights)
    torch.testing.assert_close(whole, F.cross_entropy(logits[:4], shares[:4], weight=weights))
    torch.testing.assert_close(parts, whole)
    flags = torch.tensor([[1.0, 0, UNKNOWN], [0, 1, 1], [1, 1, 0], [UNKNOWN, 0, 1], [1, 0, 0]])
    logits, whole, parts = losses_in_parts(MULTI, flags, weights)
    cells = F.binary_cross_entropy_with_logits(logits, flags, pos_weight=weights, reduction="none")
    torch.testing.assert_close(whole, cells[flags != UNKNOWN].mean())
    torch.testing.assert_close(parts, whole)
    targets = torch.randn(5, 3)
    logits, whole, parts = losses_in_parts(REGRESSION, targets, spreads=torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(whole, ((logits - targets) / torch.tensor([1.0, 2.0, 4.0])).square().mean())
    torch.testing.assert_close(parts, whole)


def test_an_adaptive_stem_adds_its_loss():
    """As it does to the model's own loss, here of weights that change nothing, of a part of a step."""
    stem = {"stem_type": "adaptive", "adaptive_budget_weight": 0.5, "use_cls_token": False, "pooling_type": "mean"}
    own = model(**stem, num_labels=3).train()
    loss = TargetLoss(Problem(SINGLE, ("a", "b", "c"), ("x",)), own, torch.ones(3))
    labels = torch.arange(len(tiny.pixels())) % 3
    for items in (None, torch.tensor(5)):
        torch.manual_seed(0)
        expected = own(tiny.pixels(), labels, num_items_in_batch=items).loss
        torch.manual_seed(0)
        ours = loss(own(tiny.pixels()), labels, items)
        torch.testing.assert_close(ours, expected)
        assert loss.stem_loss > 0


def test_balanced_weights():
    labels = np.array([0] * 6 + [1] * 3)
    single = Problem(SINGLE, ("a", "b"), ("x",))
    np.testing.assert_allclose(class_weights(single, labels, ["balanced"]), [9 / 12, 9 / 6])
    np.testing.assert_allclose(class_weights(single, labels, ["b=4"]), [0.5, 2.0])  # mean over rows 1
    flags = np.array([[1, 0], [1, 1], [0, UNKNOWN], [1, 0]])
    np.testing.assert_allclose(class_weights(Problem(MULTI, ("a", "b"), ("x",)), flags, ["balanced"]), [1 / 3, 2.0])
    shares = np.array([[0.5, 0.5], [1.0, 0.0]])
    weights = class_weights(Problem(SOFT, ("a", "b"), ("x",)), shares, ["balanced"])
    np.testing.assert_allclose(weights, [2 / (2 * 1.5), 2 / (2 * 0.5)])
    for asked, message in ((["c=2"], "labels are a, b"), (["a=-1"], "got 'a=-1'"), (["a"], "LABEL=WEIGHT")):
        with pytest.raises(ValueError, match=message):
            class_weights(single, labels, asked)
    with pytest.raises(ValueError, match="numbers have no labels to weigh"):
        class_weights(Problem(REGRESSION, ("a",), ("a",)), np.zeros((2, 1)), ["balanced"])


def test_a_layer_in_units_is_saved_as_a_plain_one():
    """Bit for bit, there and back: spreads are powers of two."""
    plain = torch.nn.Linear(4, 2)
    units = UnitLinear.of(plain, torch.tensor([9.5, 0.03]), None)
    hidden = torch.randn(3, 4)
    assert units.spreads.tolist() == [8.0, 2.0**-5]
    assert torch.equal(units(hidden), plain(hidden))
    saved = units.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.state_dict().items()) and len(saved) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, exact = plain(hidden), units(hidden)
    assert rounded.dtype == torch.bfloat16 and torch.equal(exact, plain(hidden))


def test_metrics_of_several_labels_by_hand():
    logits = np.log(
        np.array([[0.9, 0.2, 0.6], [0.8, 0.6, 0.1], [0.1, 0.7, 0.3]])
        / np.array([[0.1, 0.8, 0.4], [0.2, 0.4, 0.9], [0.9, 0.3, 0.7]])
    )
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, UNKNOWN]], float)
    found = Metrics(Problem(MULTI, ("a", "b", "c"), ("x",)))(
        type("P", (), {"predictions": logits, "label_ids": labels})
    )
    # a: ranked 1 of 3 right, then the last; b: both right first; c: nobody has it
    assert found["mean_average_precision"] == pytest.approx((np.mean([1, 2 / 3]) + 1) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert found["macro_f1"] == pytest.approx((2 / (2 + 1 + 1) + 1) / 2)
    assert found["exact_match"] == 0.0


def test_metrics_of_numbers_by_hand():
    problem = Problem(REGRESSION, ("a",), ("a",))
    given = {"predictions": np.array([[1.0], [2.0], [5.0]]), "label_ids": np.array([[1.0], [4.0], [np.nan]])}
    found = Metrics(problem)(type("P", (), given))
    assert found == pytest.approx({"mae": 1.0, "rmse": 2**0.5, "r2": 1 - 4 / 4.5})


def test_refusals(options, tmp_path):
    for kind, more, message in (
        (REGRESSION, {"label_smoothing_factor": 0.1}, "smooths classes of which a picture has one, got regression"),
        (MULTI, {"label_smoothing_factor": 0.1}, "got multi_label_classification; leave it out"),
        (SINGLE, {"prediction_loss_only": True}, "--do_predict writes predictions.csv, which --prediction_loss_only"),
        (REGRESSION, {"class_weights": ["balanced"]}, "numbers have no labels to weigh"),
    ):
        with pytest.raises(ValueError, match=message):
            run_here(train_classification, **{**options[kind], **more, "max_steps": 1, "output_dir": tmp_path / "run"})
    (tmp_path / "same").mkdir()
    for row in range(4):
        sets.save(tmp_path / "same" / f"{row}.png", sets.REGRESSION, row)
    (tmp_path / "same" / "train.csv").write_text("image,label\n" + "".join(f"{row}.png,2.5\n" for row in range(4)))
    given = {**options[REGRESSION], "label_columns": None, "do_eval": None, "do_predict": None}
    with pytest.raises(ValueError, match="expected values that differ in column 'label', every row has 2.5"):
        run_here(train_classification, **{**given, "dataset": tmp_path / "same"}, output_dir=tmp_path / "run")
