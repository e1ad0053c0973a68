"""Programs say what `predict` says, for every family and calibrator, and the comparison notices one that does not.

Nothing here is random: draws, pixels and weights have fixed seeds, and what is compared is equal but for rounding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayesnet.calibration import CALIBRATORS, Calibrator, calibrator_from_json
from bayesnet.calibration.identity import Identity
from bayesnet.data import Preprocessing
from bayesnet.engine import Engine
from bayesnet.errors import ConfigError
from bayesnet.exporting import FORMATS, OUTPUTS, Program, trace
from bayesnet.exporting.decompositions import cholesky, searchsorted
from bayesnet.inference import FAMILIES
from bayesnet.inference.base import Posterior
from bayesnet.inference.mc_dropout import MCDropoutConfig, NetworkDropout
from bayesnet.inference.nuts import Nuts
from bayesnet.predictive import Predictor
from bayesnet.testing import FlattenBackbone, build, toy_problem
from bayesnet.workflows.exporting import MAX_DIFFERENCE, _predicted, largest_difference

PIXELS = Preprocessing(1, 1, 4, mean=(0.5,), std=(0.3,))
LEVEL = 0.8
CHUNK = 8

# Every family, and what of its settings changes how it predicts.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in FAMILIES},
    "laplace, diagonal": ("laplace", {"structure": "diagonal"}),
    "laplace, full": ("laplace", {"structure": "full"}),
    "laplace, probit": ("laplace", {"predictive": "probit"}),
    "laplace, bridge": ("laplace", {"predictive": "bridge"}),
    "vbll, dense": ("vbll", {"covariance": "dense"}),
    "ensemble of mean_field": ("ensemble", {"member_family": "mean_field"}),
    "swag, head": ("swag", {"scope": "head"}),
    "guide, full covariance": ("guide", {"guide": "AutoMultivariateNormal"}),
    "mc_dropout, network": ("mc_dropout", {"scope": "network"}),
}
CALIBRATED: dict[str, dict[str, Any]] = {
    "identity": {},
    "temperature": {"temperature": 1.7},
    "vector": {"scale": [0.5, 1.0, 2.0], "bias": [0.1, 0.0, -0.4]},
    "isotonic": {
        "probabilities": [[0.1, 0.3, 0.6, 0.8], [0.2, 0.5], [0.05, 0.4, 0.9]],
        "values": [[0.0, 0.2, 0.7, 0.9], [0.1, 0.8], [0.3, 0.35, 1.0]],
        "floor": 0.01,
    },
    "bayesian_temperature": {"temperatures": [0.7 + index / 128 for index in range(256)]},
}


class DroppingBackbone(FlattenBackbone):
    """A backbone with dropout of its own, of elements and of channels."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.elements, self.channels = nn.Dropout(0.3), nn.Dropout2d(0.4)
        self.mix = nn.Linear(num_features, num_features)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BD: Tensor = self.mix(self.elements(x_BCHW.flatten(1)))
        dropped_BD: Tensor = self.channels(features_BD[:, :, None, None]).flatten(1)
        return dropped_BD.tanh()


def posterior_of(case: str) -> Posterior:
    """Return a posterior of a case whose draws differ, though nothing was trained for long."""
    name, settings = CASES[case]
    problem = toy_problem()
    if settings.get("scope") == "network":
        torch.manual_seed(0)
        parts = problem.parts()._replace(backbone=DroppingBackbone(4))
        return NetworkDropout(parts, MCDropoutConfig(scope="network", max_draws=8)).eval()
    small = {"max_draws": 8, "epochs": 2, "rank": 2} if name in ("swag", "mean_field_all") else {}
    posterior = build(FAMILIES[name], problem, **(small | settings))
    if isinstance(posterior, Nuts):  # sampling is tested elsewhere; these are draws as good as any
        posterior.stored.store(torch.randn(256, 3, 5, generator=torch.Generator().manual_seed(0)))
    else:
        FAMILIES[name].finalize(posterior, [(problem.x_NCHW, problem.y_N)])
    return posterior


def pixels(num_images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, *PIXELS.shape), generator=generator, dtype=torch.uint8)


def difference(
    posterior: Posterior, calibrator: Calibrator, folder: Path, form: str, planted: dict[str, Any] | None = None
) -> float:
    """Return how far a program, read back from its file, is from `predict`; a fault can be planted in the program."""
    predictor = Predictor(
        posterior, PIXELS, engine=Engine(torch.device("cpu")), chunk_size=CHUNK, calibrator=calibrator
    )
    parts = {"preprocessing": PIXELS, "calibrator": calibrator, "level": LEVEL, **(planted or {})}
    program = Program(posterior, num_samples=predictor.num_samples, **parts)
    batches = [pixels(1, 1), pixels(2, 2), pixels(CHUNK + 3, 3)]
    expected = [_predicted(predictor, batch, LEVEL) for batch in batches]
    path = folder / FORMATS[form].file
    FORMATS[form].write(trace(program, "toy"), path, "{}")
    return largest_difference(FORMATS[form].load(path), batches, expected)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case in FAMILIES else pytest.mark.slow) for case in CASES]
)
def test_every_family_is_the_same_program(case: str, tmp_path: Path) -> None:
    assert difference(posterior_of(case), Identity(), tmp_path, "torch") < 1e-5


@pytest.mark.extra
@pytest.mark.parametrize("case", CASES)
def test_every_family_is_the_same_in_onnx(case: str, tmp_path: Path) -> None:
    assert difference(posterior_of(case), Identity(), tmp_path, "onnx") < 1e-5


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.extra)])
def test_every_calibrator_is_in_the_program(name: str, form: str, tmp_path: Path) -> None:
    for case in ("deterministic", "mean_field"):  # one draw, and many
        calibrator = calibrator_from_json({"name": name, **CALIBRATED[name]})
        assert difference(posterior_of(case), calibrator, tmp_path, form) < 1e-5


@pytest.mark.parametrize(
    "fault",
    [
        {"level": LEVEL + 0.02},
        {"calibrator": calibrator_from_json({"name": "temperature", "temperature": 1.01})},
        {"preprocessing": dataclasses.replace(PIXELS, mean=(0.502,))},
    ],
    ids=["level", "calibrator", "normalisation"],
)
def test_the_comparison_notices_a_fault(fault: dict[str, Any], tmp_path: Path) -> None:
    """The smallest faults here: 0.02 of level, 1 % of temperature, half a grey level of the mean."""
    assert difference(posterior_of("mean_field"), Identity(), tmp_path, "torch", fault) > MAX_DIFFERENCE


def test_a_program_of_another_shape_or_nan_is_infinitely_wrong() -> None:
    right = {"mean": torch.rand(2, 3).double().numpy()}
    for wrong in (right["mean"][:1], right["mean"] * float("nan")):
        assert not largest_difference(lambda images, wrong=wrong: {"mean": wrong}, [pixels(2)], [right]) <= 1  # type: ignore[misc]


@pytest.mark.parametrize("case", CASES)
def test_fixed_draws_are_those_of_predictions(case: str) -> None:
    posterior, x_BCHW = posterior_of(case), PIXELS.normalize(pixels(3))
    with torch.no_grad():
        outside = posterior.predict_draws(x_BCHW, 8)
        with posterior.fixed_draws(8):
            inside = [posterior.predict_draws(x_BCHW, 8) for _ in range(2)]
        after = posterior.predict_draws(x_BCHW, 8)
    assert all(torch.equal(outside, each) for each in (*inside, after))


@pytest.mark.parametrize("case", ["mean_field_all", "mc_dropout, network", "guide", "full_rank"])
def test_nothing_is_fixed_once_the_context_is_left(case: str) -> None:
    """A parameter that changes afterwards changes the draws, also where an error ended the context."""
    posterior, x_BCHW = posterior_of(case), PIXELS.normalize(pixels(2))
    with torch.no_grad():
        before = posterior.predict_draws(x_BCHW, 8)
        with pytest.raises(ZeroDivisionError), posterior.fixed_draws(8):
            _ = 1 / 0
        for parameter in posterior.parameters():
            parameter.add_(0.1)
        assert not torch.equal(posterior.predict_draws(x_BCHW, 8), before)


def test_the_network_gets_the_tensor_that_predict_gives_it() -> None:
    seen: list[Tensor] = []
    posterior = posterior_of("deterministic")
    handle = posterior.get_submodule("backbone").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = pixels(CHUNK)
    engine = Engine(torch.device("cpu"))
    Predictor(posterior, PIXELS, engine=engine, chunk_size=CHUNK).log_probabilities(images)
    program = Program(posterior, PIXELS, Identity(), num_samples=1, level=LEVEL)
    program(images)
    handle.remove()
    assert torch.equal(*seen)
    assert torch.equal(seen[0], PIXELS.normalize(images)), "which is what training normalises by"


class Branching(FlattenBackbone):
    """A backbone that looks at its pixels to decide what to compute."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(1) if float(x_BCHW.sum()) > 0 else -x_BCHW.flatten(1)


def test_what_cannot_be_traced_is_named_with_its_reason() -> None:
    family = FAMILIES["mean_field"]
    posterior = family.build(toy_problem().parts()._replace(backbone=Branching(4)), family.config())
    program = Program(posterior, PIXELS, Identity(), num_samples=8, level=LEVEL)
    with pytest.raises(ConfigError, match=r"the family cannot be exported \(mean_field\): the tracer says: \w+"):
        trace(program, "mean_field")


def test_floating_point_pixels_go_in_as_they_are(tmp_path: Path) -> None:
    raw = Preprocessing(1, 1, 4, mean=(2.0,), std=(3.0,), pixel_scale=1.0)
    program = Program(posterior_of("deterministic"), raw, Identity(), num_samples=1, level=LEVEL)
    FORMATS["torch"].write(trace(program, "toy"), tmp_path / "a.pt2", "{}")
    images = torch.randn(5, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    found, right = FORMATS["torch"].load(tmp_path / "a.pt2")(images), program(images)
    assert program.input_dtype == torch.float32
    assert list(found) == list(OUTPUTS)
    assert all(torch.equal(torch.from_numpy(found[name]), right[name]) for name in OUTPUTS)


def test_the_operators_for_onnx_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 6, 6, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(6)
    torch.testing.assert_close(cholesky(matrix)[0], torch.linalg.cholesky(matrix))
    for num_knots in (1, 2, 3, 7, 8, 9):
        knots = torch.rand(3, num_knots, generator=generator).sort(-1).values
        values = torch.cat([torch.rand(3, 50, generator=generator), knots, knots - 1e-6], -1)
        assert torch.equal(searchsorted(knots, values, right=True), torch.searchsorted(knots, values, right=True))
