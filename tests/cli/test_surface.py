"""The public surface, frozen: commands, options, JSON keys, exit codes. A change here is a change for every user."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import click
import pytest
from bayesnet_cli.main import BROKEN_PIPE, cli

from bayesnet import errors
from bayesnet.battery import running
from bayesnet.battery.base import Check, Fault, Findings, Outcome

RunCli = Callable[..., tuple[int, str, str]]

SURFACE = {
    "": "--version --debug --help",
    "train": "--bayesian --data --family --backbone --weights --freeze --mode --epochs --seed --devices --workers "
    "--config --set --out --resume --profile --json",
    "calibrate": "[RUN] --alpha --calibrator --sets --max-risk --ood --corrupt --devices --json",
    "predict": "PATH... --run --model --interval --samples --format --classes --out --continue --strict --grid "
    "--html --null --spreadsheet-safe --devices --json",
    "bench": "[RUN] --devices --batch --samples --seconds --json",
    "compare": "RUN... --json",
    "export": "[RUN] --model --format --interval --samples --out --json",
    "list": "WHAT [PATTERN] --json",
    "check-data": "PATH --max-pixels --json",
    "doctor": "--json",
    "selftest": "--full --seed --json",
}

EXIT_CODES = {
    "BayesnetError": 1,
    "ConfigError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "DeviceError": 5,
    "StorageError": 6,
    "DivergedError": 7,
    "BusyError": 8,
}

METRICS = "accuracy nll brier ece ace mce aurc auroc_error"
EVALUATED = f"{METRICS} num_test ci95{{ {METRICS} }}"
ALSO = "top5 ece_classwise ece_smooth eaurc brier_decomposition{ reliability resolution uncertainty within_bin }"
AT = "risk_at_coverage coverage_at_risk"
EVALUATION = f"{EVALUATED} ece_null95 ece_debiased num_errors num_infinite_nll {ALSO} {AT}"
THRESHOLD = "method alpha threshold num_calibration"
CONFORMAL = f"{THRESHOLD} coverage coverage_band mean_set_size num_empty num_test notice"
CLASS_CONDITIONAL = f"{CONFORMAL} by_class{{ band coverage num_calibration num_test }}"
RAPS = f"{CONFORMAL} penalty num_unpenalised"
BINS = "low high count confidence accuracy"
AT_SEVERITY = "severity accuracy nll ece"
UNCERTAINTY = "mean mean_right mean_wrong auroc_error histogram{ edges right wrong }"
SHOWN = "index name label predicted probability value"
DIFFERENCE = "difference ci95 p_value p_value_holm"
DETECTED = "auroc auroc_ci95 aupr_in aupr_out fpr95"
TOLD = (
    f"description num_images no_interval scores{{ max_probability{{ {DETECTED} }} entropy{{ {DETECTED} }} "
    f"mutual_information{{ {DETECTED} }} energy{{ {DETECTED} }} feature_density{{ {DETECTED} }} }}"
)
ENVIRONMENT = "versions devices platform machine threads cpus"
# NAME stands for deterministic and bayesian. What may differ from machine to machine is not looked into.
JSON_KEYS = {
    "train": """
        run fingerprint seconds finished finished_at
        data{ name num_train num_validation num_calibration num_test classes }
        models{ NAME{ EVALUATION family epoch epochs step digest validation_nll train_nll kl kl_is_exact facts
            kl_per_example posterior_temperature seconds
            posterior_scale{ initial final } } }""",
    "calibrate": """
        run sentence report left_out alpha data{ name classes num_half_a num_half_b num_test }
        models{ NAME{ family posterior_temperature digest before{ EVALUATION } after{ EVALUATION }
            calibrator{ name temperature } temperature notice
            threshold{ THRESHOLD } abstention_threshold abstention
            conformal{ lac{ CONFORMAL } aps{ CONFORMAL } raps{ RAPS } class_conditional{ CLASS_CONDITIONAL } }
            reliability{ before{ BINS } after{ BINS } } risk_coverage{ coverage risk }
            confusion classes{ name recall ci95 num_right num_test }
            uncertainty{ total{ UNCERTAINTY } aleatoric{ UNCERTAINTY } epistemic{ UNCERTAINTY }
                by_class{ name total aleatoric epistemic }
                most_uncertain{ SHOWN } most_epistemic{ SHOWN } confidently_wrong{ SHOWN } }
            unfamiliar{ photographs{ TOLD } corrupted{ TOLD } }
            robustness{ num_images mean{ AT_SEVERITY } corruptions }
            training{ epoch loss nll kl } } }
        differences{ nll{ DIFFERENCE } brier{ DIFFERENCE } accuracy{ DIFFERENCE } }
        conformal{ CONFORMAL }""",
    "predict": """
        run model calibrated interval{ level kind samples widened } skipped{ path reason }
        predictions{ path label probability lower upper entropy mutual_information set abstain
            classes{ name probability lower upper } }""",
    "bench": """
        source environment{ ENVIRONMENT } control{ ratio ci95 rows{ device phase ratio ci95 } }
        rows{ device phase model family batch samples images_per_second ms_median ms_p95 ci95 peak_memory_bytes
            ratio_to_deterministic ratio_ci95 }""",
    "export": """
        run out model family calibrated files{ torch onnx } input{ name shape dtype }
        outputs{ mean lower upper entropy mutual_information } interval{ level kind samples }
        max_difference max_differences{ torch onnx } verified{ num_images source batch_sizes } notes""",
    "list": """
        rows{ name description num_features parameters input_size accuracy }
        collections{ name description num_names }""",
    "compare": "same_test_split groups notices rows{ run data model family seed calibrated metrics{ EVALUATED } }",
    "selftest": """
        passed full seed seconds versions planted{ caught tried missed }
        tests{ id name what passed value bound seconds } families{ full_rank{ sd_ratio } }""",
    "check-data": """
        path ok problems notes num_images splits unreadable{ path reason }
        duplicates{ within_class across_classes across_splits } formats modes num_animated num_rotated
        sizes{ height{ min median max } width{ min median max } short_side{ low high count } }""",
    "doctor": "ENVIRONMENT ok checks{ name ok found advice exit_code }",
}
OPAQUE = {"versions", "devices", "facts", "corruptions", "splits", "formats", "modes", *AT.split()}
WORDS = {name: value for name, value in vars().items() if name.isupper() and isinstance(value, str)}
TOY_FAULT = Fault("two for one", lambda: mock.patch.object(math, "tau", 2.0))
TOY_CHECK = Check(
    "T0",
    "the selftest's own keys",
    lambda seed: Findings((Outcome("error", abs(math.tau - 2 * math.pi), 1e-9),), {"full_rank": {"sd_ratio": 1.0}}),
    (TOY_FAULT,),
)


def declared(text: str) -> set[str]:
    """Return the dotted names that a declaration of JSON_KEYS stands for."""
    text = re.sub(rf"\b({'|'.join(WORDS)})\b", lambda found: WORDS[found.group()], text)
    found: set[str] = set()
    stack: list[str] = []
    for token in text.split():
        if token == "}":
            stack.pop()
            continue
        found.add(".".join([*stack, token.removesuffix("{")]))
        if token.endswith("{"):
            stack.append(token.removesuffix("{"))
    return found


def spelled(value: object, above: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys, those of an object in a list under the list's name."""
    for item in value if isinstance(value, list) else [value]:
        for key, inner in item.items() if isinstance(item, dict) else ():
            name = f"{above}{'NAME' if key in ('deterministic', 'bayesian') else key}"
            yield name
            if key not in OPAQUE:
                yield from spelled(inner, f"{name}.")


def options(command: click.Command) -> str:
    context = click.Context(command)
    return " ".join(
        parameter.make_metavar(context) if isinstance(parameter, click.Argument) else parameter.opts[-1]
        for parameter in command.get_params(context)
        if command is cli or "--help" not in parameter.opts
    )


def test_commands_and_options() -> None:
    assert {"": options(cli), **{name: options(command) for name, command in cli.commands.items()}} == SURFACE


def test_exit_codes() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.BayesnetError) and hasattr(value, "exit_code")
    }
    found.pop("InterruptedRunError")
    assert found == EXIT_CODES
    assert [errors.InterruptedRunError(number).exit_code for number in (2, 15)] == [130, 143]
    assert BROKEN_PIPE == 141


@pytest.mark.parametrize("name", JSON_KEYS)
def test_json_keys(run_cli: RunCli, calibrated_copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command prints one JSON object and nothing else, with exactly these keys."""
    shutil.copy(calibrated_copy / "classes.json", calibrated_copy / "examples" / "bad.png")  # for what is skipped
    photos = calibrated_copy.parent / "photos"
    for folder in ("cat", "dog"):
        shutil.copytree(calibrated_copy / "examples", photos / folder)
    lines = {
        "train": "train --resume {run} --json",
        "predict": "predict {run}/examples --run {run} --json",
        "bench": "bench {run} --seconds 0.1 --devices cpu --json",
        "list": "list backbones --json",
        "check-data": "check-data {photos} --json",
        "doctor": "doctor --json",
        "selftest": "selftest --json",
    }
    monkeypatch.setattr(running, "battery", lambda *, full: (TOY_CHECK,))
    code, out, _ = run_cli(lines.get(name, f"{name} {{run}} --json"), run=calibrated_copy, photos=photos)
    assert code == (3 if name == "check-data" else 0)
    assert set(spelled(json.loads(out))) == declared(JSON_KEYS[name])


def test_the_table_has_every_command() -> None:
    assert JSON_KEYS.keys() == cli.commands.keys()
