"""T24: predictions and training batches do not depend on batch size, companions, order or workers.

Where the same chunk size is computed, every bit agrees; another chunk size may round differently, by at most 1e-5 in a
log-probability, and flips no label. All comparisons are exact or bounded: no false alarm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bayesnet.backbones import BackboneConfig, build_backbone
from bayesnet.batches import TrainingData, batch_bounds, epoch_batches
from bayesnet.data import ArrayExamples, Preprocessing
from bayesnet.data.augment import Augmentation
from bayesnet.engine import Engine
from bayesnet.inference import FAMILIES, build_inference_config, build_posterior
from bayesnet.inference.base import Parts, Posterior
from bayesnet.predictive import Predictor
from bayesnet.progress import TrainingConfig

NUM_IMAGES, NUM_CLASSES = 131, 4
ENGINE = Engine(torch.device("cpu"))
PREPROCESSING = Preprocessing(1, 8, 8, mean=(0.5,), std=(0.3,))


class Unbuffered(ArrayExamples):
    """Images that workers are used for."""

    @property
    def in_memory(self) -> bool:
        """Whether reading is a copy of memory."""
        return False


def examples() -> Unbuffered:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_IMAGES, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Unbuffered(images, torch.arange(NUM_IMAGES) % NUM_CLASSES)


def posterior(family: str, *, dropout: float = 0.0) -> Posterior:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        new = partial(build_backbone, BackboneConfig(width=4), channels=1, height=8, width=8)
        backbone = new()
        if dropout:
            features: int = backbone.num_features  # type: ignore[assignment]
            backbone = nn.Sequential(backbone, nn.Dropout(dropout))
            backbone.num_features = features  # type: ignore[assignment]
        parts = Parts(backbone, NUM_CLASSES, NUM_IMAGES, new_backbone=new)
        return build_posterior(parts, build_inference_config({"family": family}))


def log_probabilities(predictor: Predictor, indices_N: Tensor) -> Tensor:
    """Return the log-probabilities (S, N, K) of some images."""
    return torch.cat([predictor.log_probabilities(x) for x in predictor.chunks(examples(), indices_N)], 1)


def predict(model: Posterior, *, chunk_size: int = 64, workers: int = 0, indices_N: Tensor | None = None) -> Tensor:
    predictor = Predictor(model, PREPROCESSING, engine=ENGINE, chunk_size=chunk_size, workers=workers)
    return log_probabilities(predictor, torch.arange(NUM_IMAGES) if indices_N is None else indices_N)


def check_companions(model: Posterior) -> None:
    """Order, and who else is asked, change no bit."""
    whole = predict(model)
    order_N = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1))
    assert torch.equal(predict(model, indices_N=order_N), whole[:, order_N]), "order"
    assert torch.equal(predict(model, indices_N=order_N[:5]), whole[:, order_N[:5]]), "companions"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_t24_order_and_companions(family: str) -> None:
    check_companions(posterior(family))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_t24_batch_size(family: str) -> None:
    model = posterior(family)
    reference = predict(model, chunk_size=64)
    for chunk_size in (1, 7):
        other = predict(model, chunk_size=chunk_size)
        assert (other - reference).abs().max() < 1e-5
        assert torch.equal(other.exp().mean(0).argmax(-1), reference.exp().mean(0).argmax(-1))


def test_t24_workers() -> None:
    model = posterior("mean_field")
    assert torch.equal(predict(model, workers=2), predict(model))
    batches = []
    for workers in (0, 2):
        data = TrainingData(examples(), PREPROCESSING, Augmentation(crop_padding=2, flip=True, rotate=10.0), workers)
        training = TrainingConfig(batch_size=16, mixup=0.3, balanced=True)
        bounds = batch_bounds(NUM_IMAGES, 16)
        batches.append(list(epoch_batches(data, training, ENGINE, epoch=1, bounds=bounds)))
    for left, right in zip(*batches, strict=True):
        assert torch.equal(left.x_BCHW, right.x_BCHW)
        assert torch.equal(left.y, right.y)


def test_t24_a_batch_does_not_depend_on_where_the_epoch_is_taken_up() -> None:
    data = TrainingData(examples(), PREPROCESSING, Augmentation(crop_padding=2, flip=True))
    bounds = batch_bounds(NUM_IMAGES, 16)
    whole = list(epoch_batches(data, TrainingConfig(batch_size=16), ENGINE, epoch=2, bounds=bounds))
    later = list(epoch_batches(data, TrainingConfig(batch_size=16), ENGINE, epoch=2, bounds=bounds[3:]))
    assert all(torch.equal(left.x_BCHW, right.x_BCHW) for left, right in zip(whole[3:], later, strict=True))


def in_training_mode(model: Posterior) -> Posterior:
    """Plant the bug that batch norm or dropout stays in training mode."""
    model.eval = lambda: model.train()  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    "planted",
    [
        lambda: in_training_mode(posterior("mean_field")),
        lambda: in_training_mode(posterior("deterministic", dropout=0.3)),
    ],
    ids=["batch norm by batch", "dropout left on"],
)
def test_t24_planted_bugs_are_rejected(planted: Callable[[], Posterior]) -> None:
    with pytest.raises(AssertionError, match=r"order|companions"):
        check_companions(planted())
