"""What is decided before a run: how images are prepared for weights of others, and that it is said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bayesnet.settings import Settings, build_settings
from bayesnet.workflows import TrainListener
from bayesnet.workflows.preparing import decided


class Ears(TrainListener):
    """Remembers notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)


def settings(backbone: str = "resnet18", weights: str = "default", **data: object) -> Settings:
    return build_settings({"data": {"spec": "folder:x", **data}, "backbone": {"name": backbone, "weights": weights}})


def decide(given: Settings) -> tuple[Settings, list[str]]:
    ears = Ears()
    return decided(given, ears), ears.notes


@pytest.mark.parametrize(
    ("backbone", "size", "resize"),
    [("resnet18", 224, 256), ("resnet50", 224, 232), ("torchvision:efficientnet_b4", 380, 384)],
)
def test_published_weights_bring_their_preparation(backbone: str, size: int, resize: int) -> None:
    """The sizes that torchvision documents for its default weights."""
    found, notes = decide(settings(backbone))
    assert (found.data.image_size, found.data.resize, found.data.preset) == (size, resize, "none")
    assert found.data.mean == (0.485, 0.456, 0.406)
    assert len(notes) == 1
    assert notes[0].startswith("Images are prepared as for the published weights")
    # What is written to config.toml describes the same again.
    assert decide(build_settings(found.to_mapping())) == (found, [])


def test_what_the_user_says_goes_first() -> None:
    for given in (settings(image_size=96), settings(mean=[0.5], std=[0.5], channels=1), settings(preset="none")):
        found, notes = decide(given)
        assert found.data == replace(given.data, preset="none")
        assert notes == []
    imagenet, notes = decide(settings(preset="imagenet"))
    assert imagenet.data.preset == "imagenet"
    assert notes == []


def test_nothing_is_claimed_of_the_users_own_weights() -> None:
    found, notes = decide(settings(weights="mine.pth"))
    assert found.data.mean == ()
    assert [note.partition(":")[0] for note in notes] == ["Size and statistics come from your images"]
    assert decide(settings(weights="none"))[1] == []


def test_a_frozen_random_backbone_is_pointed_out() -> None:
    mapping = settings(weights="none").to_mapping()
    frozen = build_settings({**mapping, "backbone": {"name": "small_cnn", "freeze": True}})
    assert decide(frozen)[1][0].startswith("The backbone is frozen at random weights")
