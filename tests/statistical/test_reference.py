"""T8 beside its checks: the stored references are those that were made, whole, small, and of a piece."""

from __future__ import annotations

from importlib import resources

import pytest

from bayesnet.battery.reference import FITS, prediction_distance
from bayesnet.battery.stored_draws import HASHES, load
from bayesnet.checkpoint import verified_tensors
from bayesnet.errors import CheckpointError
from bayesnet.inference import FAMILIES
from bayesnet.model import linear_logits

FOLDER = resources.files("bayesnet.battery") / "reference"

# The first is no distribution; the guide is the caller's own, of which one stock guide is measured.
NO_ROW = {"deterministic", "guide"}


def test_there_is_nothing_else() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.safetensors" for name in HASHES}


@pytest.mark.parametrize("name", list(HASHES))
def test_the_references_are_those_that_were_made(name: str) -> None:
    data = (FOLDER / f"{name}.safetensors").read_bytes()
    assert len(data) < 300_000
    verified_tensors(data, sha256=HASHES[name], where=name)
    damaged = bytes([*data[:-1], data[-1] ^ 1])
    with pytest.raises(CheckpointError, match=rf"SHA-256 differs from the expected one \({name}\): it is"):
        verified_tensors(damaged, sha256=HASHES[name], where=name)


@pytest.mark.parametrize("name", list(HASHES))
def test_the_stored_draws_are_of_the_stored_moments(name: str) -> None:
    """The thinned draws say the same within 5 standard errors, taking them for independent (7e-7 for each)."""
    found = load(name)
    draws_SKD = found.draws_SKD.double()
    num_draws = len(draws_SKD)
    z_KD = (draws_SKD.mean(0) - found.mean_KD) / (found.scale_KD / num_draws**0.5)
    assert float(z_KD.abs().max()) < 5
    assert float((draws_SKD.std(0) / found.scale_KD - 1).abs().max()) < 5 / (2 * num_draws) ** 0.5
    logits_SBK = linear_logits(found.x_new_BCHW.flatten(1).double(), draws_SKD)
    assert prediction_distance(logits_SBK, found.probability_BK)[0] < 0.01


def test_every_family_is_measured() -> None:
    assert {each.name for each in FITS} | NO_ROW >= set(FAMILIES)
