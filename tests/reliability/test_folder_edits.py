"""Two hundred random edits of a folder of classes after training: refused by name, or every image keeps its class.

A class has the number that the run gave its name, never that of its place among the folders of today. A run's data are
read again by `calibrate`, `train --resume` and `export` through one function, which is the one called here.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bayesnet import workflows
from bayesnet.data import Examples, ImageData
from bayesnet.errors import DataError
from bayesnet.rundir import RunDirectory
from bayesnet.workflows.trained import load_model, read_data, read_settings

NUM_EDITS = 200


def classes_of(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def rename(root: Path, rng: random.Random) -> None:
    """Give a class another name: another place in the order, another case, or a suffix."""
    folder = rng.choice(classes_of(root))
    name = rng.choice((f"a{folder.name}", f"z{folder.name}", folder.name.upper(), f"{folder.name} "))
    folder.rename(root / name)


def swap(root: Path, rng: random.Random) -> None:
    """Let two classes change names."""
    first, second = rng.sample(classes_of(root), 2)
    first.rename(root / "between")
    second.rename(first)
    (root / "between").rename(second)


def remove(root: Path, rng: random.Random) -> None:
    """Take a class away."""
    shutil.rmtree(rng.choice(classes_of(root)))


def empty(root: Path, rng: random.Random) -> None:
    """Take the images of a class away."""
    for path in rng.choice(classes_of(root)).iterdir():
        path.unlink()


def add(root: Path, rng: random.Random) -> None:
    """Add a class that comes first, between or last, with images or without."""
    folder = root / rng.choice(("aaa", "cyan", "zzz"))
    if rng.random() < 0.5:
        shutil.copytree(rng.choice(classes_of(root)), folder, dirs_exist_ok=True)
    else:
        folder.mkdir(exist_ok=True)


def hide(root: Path, rng: random.Random) -> None:
    """Add what is no class: a hidden folder, a file, a link that leads nowhere."""
    kind = rng.randrange(3)
    if kind == 0:
        (root / ".aaa").mkdir(exist_ok=True)
    elif kind == 1:
        (root / "aaa.txt").write_text("notes")
    else:
        (root / f"link{rng.randrange(1000)}").symlink_to("nowhere")


def move(root: Path, rng: random.Random) -> None:
    """Move an image to another class."""
    first, second = rng.sample(classes_of(root), 2)
    for path in sorted(first.iterdir())[:1]:
        path.rename(second / f"moved-{path.name}")


def link(root: Path, rng: random.Random) -> None:
    """Put a link to another class in a class's place."""
    first, second = rng.sample(classes_of(root), 2)
    if not first.is_symlink():
        shutil.rmtree(first)
        first.symlink_to(second.name, target_is_directory=True)


def touch(root: Path, rng: random.Random) -> None:
    """Make the folders again in another order, as a copy does: nothing that matters."""
    for folder in rng.sample(classes_of(root), len(classes_of(root))):
        if not folder.is_symlink():
            shutil.copytree(folder, root / "again")
            shutil.rmtree(folder)
            (root / "again").rename(folder)


Edit = Callable[[Path, random.Random], None]
EDITS: tuple[Edit, ...] = (rename, swap, remove, empty, add, hide, move, link, touch)


@pytest.fixture(scope="module")
def trained(folder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a run on a folder ``photos`` beside it."""
    place = tmp_path_factory.mktemp("edits")
    shutil.copytree(folder_data, place / "photos")
    small = ("backbone.width=4", "training.batch_size=16")
    workflows.train(
        data=f"folder:{place / 'photos'}", epochs=1, overrides=small, devices="cpu", out=place / "run", bayesian=True
    )
    return place


def wrong_labels(data: ImageData) -> list[str]:
    """Return the images whose label is not the number of their folder's name among the run's classes."""
    splits: tuple[Examples, ...] = (data.train, data.validation, data.calibration, data.test)
    return [
        split.name(index)
        for split in splits
        for index, label in enumerate(split.labels_N.tolist())
        if data.classes[label] != Path(split.name(index)).parent.name
    ]


def outcome(place: Path) -> str:
    """Return "refused", or "read" where every label is right, or the images that are relabelled."""
    run = RunDirectory.open(place / "run")
    trained_classes = load_model(run, "bayesian").classes
    try:
        data = read_data(run, read_settings(run), load_model(run, "bayesian").preprocessing)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - of whatever error it is
        return "refused"
    if tuple(data.classes) != tuple(trained_classes):
        return f"other classes: {data.classes}"
    wrong = wrong_labels(data)
    return f"relabelled: {wrong[:3]}" if wrong else "read"


def edit(place: Path, folder_data: Path, seed: int) -> None:
    """Put the folder back as it was, and change it one to three times."""
    shutil.rmtree(place / "photos")
    shutil.copytree(folder_data, place / "photos")
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if len(classes_of(place / "photos")) > 1:
            rng.choice(EDITS)(place / "photos", rng)


def test_no_edit_relabels_an_image(trained: Path, folder_data: Path) -> None:
    found: Counter[str] = Counter()
    for seed in range(NUM_EDITS):
        edit(trained, folder_data, seed)
        found[outcome(trained)] += 1
    assert set(found) == {"refused", "read"}, found
    assert min(found.values()) >= 10, found


def test_a_reader_that_numbers_the_folders_of_today_is_noticed(
    trained: Path, folder_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: the data set of today under the names of the run, its fingerprint not looked at."""
    run = RunDirectory.open(trained / "run")
    model = load_model(run, "bayesian")
    shutil.rmtree(trained / "photos")
    shutil.copytree(folder_data, trained / "photos")
    (trained / "photos" / "blue").rename(trained / "photos" / "zblue")
    monkeypatch.setattr(RunDirectory, "read_summary", lambda self: {"fingerprint": Anything()})
    data = read_data(run, model.settings, model.preprocessing)
    assert wrong_labels(data) == []
    assert wrong_labels(data._replace(classes=model.classes))


class Anything:
    """What equals everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


def test_predictions_name_the_classes_of_the_run(trained: Path, folder_data: Path) -> None:
    """Whatever became of the folder: `predict` does not look at it."""
    shutil.rmtree(trained / "photos")
    image = next((folder_data / "red").iterdir())
    [row] = workflows.predict([image], run=trained / "run", devices="cpu")["predictions"]
    assert [entry["name"] for entry in row["classes"]] == ["blue", "green", "red"]
    assert torch.tensor([entry["probability"] for entry in row["classes"]]).sum() == pytest.approx(1)
