"""Long NUTS runs on small softmax heads: the reference draws that the self-test's T8 compares with.

    python benchmarks/nuts_reference.py --out bayesnet/battery/reference

Two problems of softmax regression, labels drawn from the model with standard normal weights: 3 classes and 4 features,
10 classes and 8 features. Ten chains of 2,000 draws each; a run is refused unless every weight has a rank-normalised
split R-hat below 1.01, an effective sample size above 4,000 and no draw diverged. Each file (below 300 kB) holds the
problem, new images, their mean class probabilities and the weights' means and standard deviations over all draws
(float64), and some of the draws, evenly thinned (float32). The script prints each file's SHA-256, without which
bayesnet/battery/stored_draws.py does not read it: paste them there. With --smoke, two chains of 20 draws, nothing
refused.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from safetensors.torch import save_file
from torch import Tensor

from bayesnet.inference.nuts_sampler import Chains, Diagnostics, HeadTarget, diagnose, sample_head
from bayesnet.model import BayesianHead, linear_logits
from bayesnet.testing import toy_problem

NUM_NEW_IMAGES = 200
MAX_RHAT, MIN_ESS = 1.01, 4000


class Reference(NamedTuple):
    """A problem and how many of its draws are stored."""

    num_examples: int
    num_features: int
    num_classes: int
    num_stored: int

    @property
    def name(self) -> str:
        """The file's, without its ending."""
        return f"softmax-k{self.num_classes}-d{self.num_features}"


REFERENCES = (Reference(60, 4, 3, 4000), Reference(200, 8, 10, 700))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for reference in REFERENCES:
        started = time.perf_counter()
        tensors, found = run(reference, smoke=arguments.smoke)
        diagnostics = diagnose(found)
        print(f"{reference.name}: {diagnostics}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if not arguments.smoke:
            check(diagnostics)
        path = arguments.out / f"{reference.name}.safetensors"
        save_file(tensors, path, metadata={"provenance": provenance(found, diagnostics)})
        print(f"{path.name} {path.stat().st_size} bytes {hashlib.sha256(path.read_bytes()).hexdigest()}")


def run(reference: Reference, *, smoke: bool) -> tuple[dict[str, Tensor], Chains]:
    """Return what is stored of a reference, and all draws."""
    problem = toy_problem(reference.num_examples, reference.num_features, reference.num_classes)
    x_ND, y_N = problem.x_NCHW.flatten(1), problem.y_N
    head = BayesianHead(reference.num_features, reference.num_classes, len(y_N), 1.0, 1.0)
    chains, warmup, draws = (2, 20, 20) if smoke else (10, 500, 2000)
    start_KD = torch.zeros(reference.num_classes, reference.num_features + 1)
    found = sample_head(HeadTarget(head, x_ND, y_N), start_KD, chains=chains, warmup=warmup, draws=draws, seed=0)
    weight_TKD = found.draws_CSP.flatten(0, 1).view(-1, *start_KD.shape)
    generator = torch.Generator().manual_seed(1)
    x_new_BD = torch.randn(NUM_NEW_IMAGES, reference.num_features, generator=generator)
    thinning = torch.linspace(0, len(weight_TKD) - 1, min(reference.num_stored, len(weight_TKD))).round().long()
    tensors = {
        "x_ND": x_ND.contiguous(),
        "y_N": y_N,
        "x_new_BD": x_new_BD,
        "probability_BK": linear_logits(x_new_BD.double(), weight_TKD).softmax(-1).mean(0),
        "mean_KD": weight_TKD.mean(0),
        "scale_KD": weight_TKD.std(0),
        "draws_SKD": weight_TKD[thinning].float(),
    }
    return tensors, found


def check(diagnostics: Diagnostics) -> None:
    """Stop unless the chains converged."""
    converged = diagnostics.max_rhat < MAX_RHAT and diagnostics.min_ess > MIN_ESS
    if not converged or diagnostics.num_divergences:
        raise SystemExit("not converged: run longer chains")


def provenance(found: Chains, diagnostics: Diagnostics) -> str:
    """Return how the draws were made, as one text: the order of several would differ between runs, and so the hash."""
    num_chains, num_draws, _ = found.draws_CSP.shape
    return (
        f"{num_chains} chains x {num_draws} draws, {found.num_gradients} gradients, "
        f"R-hat <= {diagnostics.max_rhat:.5f}, ESS >= {diagnostics.min_ess:.0f}, "
        f"{diagnostics.num_divergences} divergences; "
        f"python {platform.python_version()}, torch {torch.__version__}, pyro {pyro.__version__}"
    )


if __name__ == "__main__":
    main()
