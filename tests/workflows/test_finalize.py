"""Members trained one after the other and the pass after training: resumable anywhere, one checkpoint of the whole."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bayesnet.inference
import bayesnet.settings
from bayesnet import workflows
from bayesnet.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint
from bayesnet.data import DataConfig, ImageData, load_data
from bayesnet.data.examples import SubsetExamples
from bayesnet.engine import Engine
from bayesnet.errors import CheckpointError, DivergedError, InterruptedRunError
from bayesnet.inference import deterministic, ensemble, mean_field
from bayesnet.inference.base import Family, Parts, Posterior
from bayesnet.inference.deterministic import Deterministic
from bayesnet.registry import Registry
from bayesnet.rundir import RunDirectory
from bayesnet.settings import build_settings
from bayesnet.workflows import TrainListener, finalizing, starting, trained
from bayesnet.workflows.finalizing import TrainingImages
from bayesnet.workflows.trained import load_model

SMALL = ("backbone.width=2", "training.batch_size=16", "training.twin=false")
MEMBERS = "inference.members=2"
STEPS = 6  # of a model: 3 batches an epoch, 2 epochs
SEEN: list[float] = []


@dataclass(frozen=True, kw_only=True)
class CentredConfig:
    """No settings."""

    family: str = "centred"


class Centred(Deterministic):
    """A point estimate that subtracts the features' mean over the training images, which finalize finds."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.register_buffer("mean_D", torch.zeros(parts.num_features))
        self.register_buffer("noise", torch.zeros(()))

    def logits(self, x_BCHW: Tensor, num_samples: int) -> Tensor:
        logits_BK: Tensor = self.head(self.backbone(x_BCHW) - self.get_buffer("mean_D"))
        return logits_BK.unsqueeze(0)


def find_mean(posterior: Posterior, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write the mean of the features, from two passes over the batches."""
    assert isinstance(posterior, Centred)
    assert not posterior.training
    first, second = (torch.cat([posterior.backbone(x).detach() for x, _ in batches]) for _ in range(2))
    assert torch.equal(first, second)
    posterior.get_buffer("mean_D").copy_(first.mean(0))
    posterior.get_buffer("noise").copy_(torch.rand(()))


def diverge(posterior: Posterior, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write what is not finite."""
    posterior.get_buffer("mean_D").fill_(torch.nan)


CENTRED = Family("centred", CentredConfig, lambda parts, config: Centred(parts), find_mean, "for tests")
FAMILIES = {each.name: each for each in (deterministic.FAMILY, mean_field.FAMILY, ensemble.FAMILY, CENTRED)}


def register(monkeypatch: pytest.MonkeyPatch, families: dict[str, Family]) -> None:
    for module in (bayesnet.inference, bayesnet.settings, trained, finalizing, starting):
        monkeypatch.setattr(module, "FAMILIES", Registry("family", families))


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, FAMILIES)


class Notes(TrainListener):
    """Remembers what it is told, and counts steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = 0

    def on_note(self, text: str) -> None:
        """Remember."""
        self.notes.append(text)

    def on_step(self, step: int, num_steps: int) -> None:
        """Count."""
        self.steps += 1


def train(folder: Path, out: Path, family: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - what train takes
    overrides = SMALL + ((MEMBERS,) if family == "ensemble" else ()) + tuple(arguments.pop("overrides", ()))
    defaults = {"family": family, "data": f"folder:{folder}", "epochs": 2, "devices": "cpu", "overrides": overrides}
    return workflows.train(**{**defaults, **arguments}, out=out)


def resume(run: Path) -> tuple[dict[str, Any], Notes]:
    listener = Notes()
    return workflows.train(resume=run, listener=listener), listener


def interrupted(folder: Path, out: Path, family: str, step: int) -> None:
    """Start a run that ends after so many steps in all."""
    calls = iter(range(1, 10**6))
    with pytest.raises(InterruptedRunError, match=r"^interrupted, checkpoint saved .*: continue with `bayesnet train"):
        train(folder, out, family, stop_signal=lambda: 15 if next(calls) == step else None)


def final(run: Path) -> dict[str, Tensor]:
    """Return the tensors of the one checkpoint of the whole, which the summary names."""
    [path] = list_checkpoints(run / "models" / "bayesian" / "checkpoints")
    digest = json.loads((run / "summary.json").read_text())["models"]["bayesian"]["digest"]
    return load_checkpoint(path, digest=digest).tensors


def same_end(left: Path, right: Path) -> None:
    """Assert that two runs have the same tensors, summary and metrics, but for the time that they took."""
    first, second = final(left), final(right)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert _timeless(json.loads((left / "summary.json").read_text())) == _timeless(
        json.loads((right / "summary.json").read_text())
    )
    assert [_timeless(line) for line in RunDirectory(left).read_metrics()] == [
        _timeless(line) for line in RunDirectory(right).read_metrics()
    ]


def _timeless(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        different = ("seconds", "digest", "run", "finished_at")  # the digest hashes the seconds of the reports
        return {key: _timeless(inner) for key, inner in value.items() if key not in different}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def straight(folder_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give the runs that nothing interrupted. Do not write to them."""
    paths = {}
    with pytest.MonkeyPatch.context() as patch:
        register(patch, FAMILIES)
        for family in ("ensemble", "centred"):
            paths[family] = tmp_path_factory.mktemp("runs") / family
            train(folder_data, paths[family], family)
    return paths


# In the first member's first epoch, at its end, after its last step, in the second member, and at the very end.
@pytest.mark.parametrize("step", [1, 3, 6, 7, 12])
def test_an_interrupted_ensemble_goes_on_in_the_right_member(
    straight: dict[str, Path], folder_data: Path, tmp_path: Path, step: int
) -> None:
    interrupted(folder_data, tmp_path / "run", "ensemble", step)
    _, listener = resume(tmp_path / "run")
    assert listener.steps == 2 * STEPS - step
    assert listener.notes[-2:] == ["Member 1 of 2.", "Member 2 of 2."]
    same_end(straight["ensemble"], tmp_path / "run")


def test_an_interrupted_run_is_finalized_when_it_is_trained(
    straight: dict[str, Path], folder_data: Path, tmp_path: Path
) -> None:
    interrupted(folder_data, tmp_path / "run", "centred", 4)
    _, listener = resume(tmp_path / "run")
    assert listener.notes[-1] == "Finalizing bayesian (centred) on the training images."
    assert "Member 1 of 1." not in listener.notes
    same_end(straight["centred"], tmp_path / "run")


@pytest.mark.parametrize("family", ["ensemble", "centred"])
@pytest.mark.parametrize(
    "where", ["bayesnet.workflows.model_fitting.finalize_posterior", "bayesnet.rundir.RunDirectory.finish"]
)
def test_a_kill_after_training_loses_nothing(
    straight: dict[str, Path],
    folder_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    where: str,
) -> None:
    """Between fit and finalize, and between the checkpoint of the whole and the summary's end."""

    def crash(*arguments: object, **named: object) -> None:
        raise RuntimeError("pulled the plug")

    with monkeypatch.context() as patch:
        patch.setattr(where, crash)
        with pytest.raises(RuntimeError, match="pulled the plug"):
            train(folder_data, tmp_path / "run", family)
    _, listener = resume(tmp_path / "run")
    assert listener.steps == 0
    same_end(straight[family], tmp_path / "run")


def test_the_whole_is_what_was_trained_and_finalized(straight: dict[str, Path]) -> None:
    run = RunDirectory(straight["centred"])
    model = load_model(run, "bayesian")
    data = load_data(model.settings.data, model.preprocessing)
    features_ND = torch.cat([model.posterior.get_submodule("backbone")(x).detach() for x, _ in images(run, data)])
    assert torch.allclose(model.posterior.get_buffer("mean_D"), features_ND.mean(0), atol=1e-6)
    member, _ = newest_checkpoint(run.path / "models" / "bayesian" / "member-1" / "checkpoints")
    assert member is not None
    tensors = final(run.path)
    assert all(name.startswith("model/") for name in tensors)
    assert torch.equal(tensors["model/head.weight"], load_chosen(run, 1)["model/head.weight"])
    assert tensors["model/mean_D"].abs().sum() > 0
    record = run.read_summary()["models"]["bayesian"]
    assert record["validation_nll"] == pytest.approx(
        model.predictor(Engine.for_one("cpu")).mean_nll(data.validation), rel=1e-6
    )
    assert "members" not in record
    assert all("member" not in line for line in run.read_metrics())


def images(run: RunDirectory, data: ImageData) -> TrainingImages:
    return TrainingImages(data, load_model(run, "bayesian").settings, Engine.for_one("cpu"))


def load_chosen(run: RunDirectory, number: int) -> dict[str, Tensor]:
    """Return the tensors of a member's best epoch, which the folder recipes choose."""
    lines = [line for line in run.read_metrics() if line.get("member", 1) == number]
    best = min(lines, key=lambda line: line["validation_nll"])
    folder = run.path / "models" / "bayesian" / f"member-{number}" / "checkpoints"
    return load_checkpoint(folder / f"step-{best['step']:08d}").tensors


def test_the_members_are_in_the_whole_each_at_its_own_best(straight: dict[str, Path]) -> None:
    run = RunDirectory(straight["ensemble"])
    tensors, record = final(run.path), run.read_summary()["models"]["bayesian"]
    for number in (1, 2):
        chosen = load_chosen(run, number)
        mine = {name: tensor for name, tensor in chosen.items() if name.startswith("model/")}
        prefix = f"model/networks.{number - 1}."
        assert {name.replace("model/", prefix) for name in mine} == {n for n in tensors if n.startswith(prefix)}
        assert all(torch.equal(tensors[name.replace("model/", prefix)], mine[name]) for name in mine)
    assert record["step"] == sum(member["step"] for member in record["members"])
    assert record["epochs"] == 4
    assert [member["epochs"] for member in record["members"]] == [2, 2]
    assert record["train_nll"] == pytest.approx(sum(member["train_nll"] for member in record["members"]) / 2)
    assert record["seconds"] >= sum(member["seconds"] for member in record["members"])
    assert record["family"] == "ensemble"
    assert [(line["member"], line["epoch"]) for line in run.read_metrics()] == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_the_first_member_is_the_run_of_the_twin(straight: dict[str, Path], folder_data: Path, tmp_path: Path) -> None:
    """Bit for bit; the second one differs in weights, order and augmentation."""
    train(folder_data, tmp_path / "twin", "deterministic")
    twin, _ = newest_checkpoint(tmp_path / "twin" / "models" / "deterministic" / "checkpoints")
    first, second = (
        newest_checkpoint(straight["ensemble"] / "models" / "bayesian" / f"member-{number}" / "checkpoints")[0]
        for number in (1, 2)
    )
    assert twin is not None
    assert first is not None
    assert second is not None
    assert twin.tensors.keys() == first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(twin.tensors[name], first.tensors[name]) for name in twin.tensors)
    assert not torch.allclose(first.tensors["model/head.weight"], second.tensors["model/head.weight"])


def test_a_family_of_one_member_without_finalize_has_the_files_that_it_had(folder_data: Path, tmp_path: Path) -> None:
    listener = Notes()
    train(folder_data, tmp_path / "run", "mean_field", listener=listener)
    assert [path.name for path in (tmp_path / "run" / "models" / "bayesian").iterdir()] == ["checkpoints"]
    assert all("optimizer" in " ".join(load_checkpoint(path).tensors) for path in checkpoints(tmp_path / "run"))
    assert not any("ember" in note or "inalizing" in note for note in listener.notes)


def checkpoints(run: Path) -> list[Path]:
    return list_checkpoints(run / "models" / "bayesian" / "checkpoints")


def test_what_comes_out_of_finalize_must_be_finite(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, FAMILIES | {"centred": CENTRED._replace(finalize=diverge)})
    with pytest.raises(DivergedError) as caught:
        train(folder_data, tmp_path / "run", "centred")
    hint = "lower optimizer.learning_rate; the checkpoints of training are kept"
    assert str(caught.value) == f"finalizing diverged (centred, mean_D): {hint}"
    assert checkpoints(tmp_path / "run") == []
    register(monkeypatch, FAMILIES)  # mended
    _, listener = resume(tmp_path / "run")
    assert listener.steps == 0


def test_finalize_is_a_function_of_the_seed_and_leaves_the_callers_random_state(
    straight: dict[str, Path], folder_data: Path, tmp_path: Path
) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train(folder_data, tmp_path / "again", "centred")
    assert torch.equal(torch.get_rng_state(), before)
    train(folder_data, tmp_path / "other", "centred", seed=1)
    noise = [final(path)["model/noise"] for path in (straight["centred"], tmp_path / "again", tmp_path / "other")]
    assert noise[0] == noise[1] != noise[2]


def test_the_batches_are_the_training_images_as_they_are() -> None:
    settings = build_settings({"training": {"batch_size": 16}})
    data = load_data(DataConfig())
    data = data._replace(train=SubsetExamples(data.train, torch.arange(33)))
    batches = TrainingImages(data, settings, Engine.for_one("cpu"))
    for _ in range(2):
        pairs = list(batches)
        assert [len(y_B) for _, y_B in pairs] == [16, 17]  # a last batch of one joins the one before it
        assert torch.equal(torch.cat([y_B for _, y_B in pairs]), data.train.labels_N)
        expected = data.preprocessing.normalize(data.train.read(torch.arange(33)))
        assert torch.equal(torch.cat([x_BCHW for x_BCHW, _ in pairs]), expected)


def test_a_failed_start_leaves_nothing(folder_data: Path, tmp_path: Path) -> None:
    for family in ("ensemble", "centred"):
        with pytest.raises(DivergedError):
            train(folder_data, tmp_path / "deep" / "run", family, overrides=("optimizer.learning_rate=1e30",))
        assert not (tmp_path / "deep").exists()


def test_pretrained_weights_are_read_for_members_that_have_not_begun(
    folder_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    original = trained.new_posterior

    def spy(*arguments: Any, load_weights: bool) -> Posterior:  # noqa: ANN401 - what new_posterior takes
        asked.append(load_weights)
        return original(*arguments, load_weights=load_weights)

    monkeypatch.setattr("bayesnet.workflows.model_fitting.new_posterior", spy)
    interrupted(folder_data, tmp_path / "first", "ensemble", 2)
    interrupted(folder_data, tmp_path / "second", "ensemble", 8)
    assert asked == [True, True]
    resume(tmp_path / "first")
    resume(tmp_path / "second")
    assert asked[2:] == [False, True, False]


def test_members_cannot_be_exchanged(folder_data: Path, tmp_path: Path) -> None:
    interrupted(folder_data, tmp_path / "run", "ensemble", 8)
    folder = tmp_path / "run" / "models" / "bayesian"
    (folder / "member-1").rename(folder / "member-0")
    (folder / "member-2").rename(folder / "member-1")
    (folder / "member-0").rename(folder / "member-2")
    with pytest.raises(CheckpointError, match=r"^the checkpoint was made with other member \("):
        resume(tmp_path / "run")


def test_a_link_out_of_the_run_is_refused(folder_data: Path, tmp_path: Path) -> None:
    interrupted(folder_data, tmp_path / "run", "ensemble", 2)
    folder = tmp_path / "run" / "models" / "bayesian"
    (folder / "member-1").rename(tmp_path / "elsewhere")
    (folder / "member-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"^a link leads out of the run directory \(.*member-1"):
        resume(tmp_path / "run")


def test_a_finished_ensemble_is_calibrated_and_predicts(straight: dict[str, Path], folder_data: Path) -> None:
    model = load_model(RunDirectory(straight["ensemble"]), "bayesian")
    assert model.predictor(Engine.for_one("cpu")).num_samples == 2
    record = workflows.predict([folder_data / "red"], run=straight["ensemble"], devices="cpu")
    assert record["interval"]["kind"] == "range of 2 draws"
