r"""Matrix-normal posterior over the last layer: one covariance of the classes, one of the features.

    W ~ MN(M, U, V):  cov(w_kd, w_je) = U_kj V_de,    U = A A^T (K, K),  V = B B^T (D + 1, D + 1)
    A, B: lower triangular, positive diagonals, rows of length u_k and v_d, so the marginal sd are u_k v_d
    T = (D + 1) T(U) + K T(V),  the total correlations,    since log det (U x V) = (D + 1) log det U + K log det V
    KL: gaussian_weight. The prior's sd p_kd may differ by column (the bias): it is independent, so its trace term is
        sum_kd U_kk V_dd / p_kd^2 and needs the diagonals alone
    logits of an image with features f: mean M [f; 1], covariance ([f; 1]^T V [f; 1]) U

Only the products u_k v_d are identified, and nothing else is used: u may grow while v shrinks, which changes neither
q nor the bound, has a gradient of 0, and does no harm.
Assumptions: the covariance is a Kronecker product; the prior is normal; the backbone is a point estimate, trained
jointly on the same bound.
Cost: (D + 1)^2 + K^2 parameters besides the means; a (B, D) x (D, D) and a (B, K) x (K, K) product per step.
Reference: Louizos and Welling 2016, "Structured and efficient variational deep learning with matrix Gaussian
posteriors", arXiv:1603.04733.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bayesnet import elbo
from bayesnet.inference.base import Family, Parts, Posterior, no_finalize
from bayesnet.inference.draw_table import table_prefix
from bayesnet.inference.gaussian_weight import (
    GaussianWeight,
    GaussianWeightConfig,
    GaussianWeightPosterior,
    WeightGuide,
    covariance_factor,
    require_fits,
    with_ones,
)
from bayesnet.inference.products import product
from bayesnet.types import LogitGaussian, Loss


@dataclass(frozen=True, kw_only=True)
class MatrixNormalConfig(GaussianWeightConfig):
    """Settings of the matrix-normal head.

    Attributes:
        family: The name, "matrix_normal".
    """

    family: str = "matrix_normal"


class MatrixNormalWeight(GaussianWeight):
    """The Gaussian: W = M + A e B^T with noise e (K, D + 1).

    Args:
        loc_KD: Means.
        class_scale_K: u.
        column_scale_D: v, (D + 1,).
        raw_class_KK: A, as `covariance_factor` takes it.
        raw_column_DD: B, likewise.
    """

    def __init__(
        self, loc_KD: Tensor, class_scale_K: Tensor, column_scale_D: Tensor, raw_class_KK: Tensor, raw_column_DD: Tensor
    ) -> None:
        self.class_factor, class_correlation = covariance_factor(raw_class_KK, class_scale_K)
        self.column_factor, column_correlation = covariance_factor(raw_column_DD, column_scale_D)
        num_classes, num_columns = loc_KD.shape
        total_correlation = num_columns * class_correlation + num_classes * column_correlation
        super().__init__(loc_KD, class_scale_K.unsqueeze(1) * column_scale_D, total_correlation)

    def deviations(self, shape: torch.Size) -> Tensor:
        """Return A e B^T."""
        return self.class_factor @ self.loc.new_empty(shape).normal_() @ self.column_factor.T

    def squared_distance(self, deviation: Tensor) -> Tensor:
        """Return the sum of squares of A^-1 (W - M) B^-T."""
        rows = torch.linalg.solve_triangular(self.class_factor, deviation, upper=False)
        white: Tensor = torch.linalg.solve_triangular(self.column_factor.T, rows, upper=True, left=False)
        return white.square().sum((-2, -1))

    def logit_moments(self, features_BD: Tensor) -> LogitGaussian:
        """Return the Gaussian of the logits: no independent part, a factor (B, K, K)."""
        mean_BK, spread_B = self.mean_and_spread(features_BD)
        return LogitGaussian(mean_BK, torch.zeros_like(mean_BK), spread_B[:, None, None] * self.class_factor)

    def mean_and_spread(self, features_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits' means (B, K), and sqrt([f; 1]^T V [f; 1]) (B,)."""
        columns_BD = with_ones(features_BD)
        return product(columns_BD, self.loc.T), torch.linalg.vector_norm(product(columns_BD, self.column_factor), dim=1)


class MatrixNormalGuide(WeightGuide):
    """The guide over the head's weight.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1).
        initial_scale: Initial posterior standard deviation as a fraction of the prior's (its best product u v).
    """

    def __init__(self, prior_scale_KD: Tensor, initial_scale: float) -> None:
        super().__init__(prior_scale_KD)
        log_scale_KD = (initial_scale * prior_scale_KD).log()
        num_classes, num_columns = log_scale_KD.shape
        self.log_class_scale = nn.Parameter(log_scale_KD.mean(1) - log_scale_KD.mean())
        self.log_column_scale = nn.Parameter(log_scale_KD.mean(0))
        self.raw_class = nn.Parameter(torch.zeros(num_classes, num_classes))
        self.raw_column = nn.Parameter(torch.zeros(num_columns, num_columns))

    def distribution(self) -> MatrixNormalWeight:
        """Return q(w), event shape (K, D + 1)."""
        return MatrixNormalWeight(
            self.loc, self.log_class_scale.exp(), self.log_column_scale.exp(), self.raw_class, self.raw_column
        )


class MatrixNormal(GaussianWeightPosterior):
    """Backbone, generative head and matrix-normal guide; nothing of size B x K x K is made of a batch.

    Args:
        parts: Backbone and sizes.
        config: Settings.

    Raises:
        ConfigError: More parameters than fit.
    """

    guide: MatrixNormalGuide

    def __init__(self, parts: Parts, config: MatrixNormalConfig) -> None:
        num_classes, num_columns = parts.num_classes, parts.num_features + 1
        num_parameters = num_columns**2 + num_classes**2 + num_classes * num_columns
        what = f"one covariance of {num_columns:,} features and one of {num_classes:,} classes"
        require_fits("matrix_normal", num_parameters, what, hint="use low_rank or mean_field")
        super().__init__(parts, config, MatrixNormalGuide, rank=num_classes)

    def local_loss(self, features_BD: Tensor, y: Tensor) -> Loss:
        """Return the negative ELBO per example; the noise is mixed once by A, not by a factor per image."""
        weight = self.guide.distribution()
        mean_BK, spread_B = weight.mean_and_spread(features_BD)
        noise_BK = elbo.standard_normal(mean_BK) @ weight.class_factor.T
        fit, nll = elbo.cross_entropy(torch.addcmul(mean_BK, spread_B.unsqueeze(1), noise_BK), y)
        kl = self.kl(weight)
        return Loss(fit + kl / self.num_examples, nll, kl, fit)

    def draws_from_features(self, features_BD: Tensor, num_samples: int) -> Tensor:
        """Return the draws (S, B, K) that the base class makes of `logit_moments`, from a table mixed once by A.

        Args:
            features_BD: Features (B, D).
            num_samples: S, a power of two, at most the table's 256 rows.

        Raises:
            ConfigError: ``num_samples`` is not such a number.
        """
        weight = self.guide.weight()
        mean_BK, spread_B = weight.mean_and_spread(features_BD)
        table_SE = table_prefix(self.get_buffer("table_SE"), num_samples)
        mixed_SK = table_SE[:, self.num_classes :] @ weight.class_factor.T
        return torch.addcmul(mean_BK, spread_B.unsqueeze(1), mixed_SK.unsqueeze(1))


def build(parts: Parts, config: MatrixNormalConfig) -> Posterior:
    """Return an untrained matrix-normal posterior."""
    return MatrixNormal(parts, config)


FAMILY = Family(
    name="matrix_normal",
    config=MatrixNormalConfig,
    build=build,
    finalize=no_finalize,
    description="one covariance between classes and one between features of the last layer",
)
