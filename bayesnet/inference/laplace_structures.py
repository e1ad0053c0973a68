r"""Covariances of the last layer's weight for the Laplace approximation: diagonal, Kronecker-factored and full.

In units of the prior's standard deviations c, v = w / c, the prior is Normal(0, I / precision), precision 1 as
configured. The generalised Gauss-Newton matrix of the softmax likelihood, for a linear head its Hessian, is

    H = sum_n L_n (x) g_n g_n',    L_n = diag(p_n) - p_n p_n',    g_n = c * [f_n; 1]
    full: H,    diagonal: diag(H),    kronecker: (sum_n L_n) (x) (sum_n g_n g_n') / N      (as laplace-torch scales it)

and each of them is Q diag(h) Q'. The posterior covariance Q diag(1 / (h + precision)) Q' is damped per eigenpair, so
that the Kronecker-factored one is exact for its H: adding the root of the precision to each factor would not be. The
buffers hold the covariance in units of w: what predictions need, in any precision; sums and eigenvalues are float64.

References: MacKay 1992, "The evidence framework applied to classification networks"; Ritter et al. 2018, "A scalable
Laplace approximation for neural networks"; Daxberger et al. 2021, "Laplace redux", arXiv:2106.14806.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from bayesnet.config import require
from bayesnet.inference.products import product

StructureName = Literal["diagonal", "kronecker", "full"]
"""The names in STRUCTURES."""

MAX_MATRIX = 8192
"""Most rows of a matrix whose eigenvectors are computed: 2 GiB while they are, and minutes on a few cores."""
MAX_CLASSES = {"diagonal": math.inf, "kronecker": 1000, "full": 100}
"""Most classes: every image of a prediction has a K x K factor, for "full" from a Cholesky decomposition of its own."""


class Eigen(NamedTuple):
    """A curvature Q diag(h) Q' in units of the prior, float64.

    Attributes:
        values: The eigenvalues h, none negative: (K, D + 1), or (M,) with M = K (D + 1).
        bases: The eigenvectors Q: none (identity), (K, K) and (D + 1, D + 1), or (M, M).
    """

    values: Tensor
    bases: tuple[Tensor, ...]


class Cost(NamedTuple):
    """What a structure needs, besides the twin.

    Attributes:
        stored_bytes: In the model and every checkpoint, float32.
        peak_bytes: While `finalize` computes eigenvectors, float64.
        operations: Multiplications of `finalize`, besides one backbone pass over the training images.
    """

    stored_bytes: int
    peak_bytes: int
    operations: int


class Covariance(nn.Module, ABC):
    """The covariance of a weight (K, D + 1), in buffers that a fit fills.

    Args:
        prior_scale_KD: Prior standard deviations (K, D + 1), the same for all classes.
        fraction: Standard deviation before the fit, as a fraction of the prior's.
    """

    rank: int
    """R, columns of the factor of the logits' Gaussian."""

    def __init__(self, prior_scale_KD: Tensor, fraction: float) -> None:
        super().__init__()
        self.num_classes, self.num_columns = prior_scale_KD.shape

    @abstractmethod
    def new_sums(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return zeros (float64) for the sums over images that the curvature is made of."""

    @abstractmethod
    def add(self, sums: tuple[Tensor, ...], probability_BK: Tensor, columns_BD: Tensor) -> None:
        """Add a batch of class probabilities (B, K) and scaled features g (B, D + 1), float64, to the sums in place."""

    @abstractmethod
    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        """Return the eigendecomposition of the curvature of ``num_images`` images."""

    @abstractmethod
    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        """Write the covariance (curvature + precision)^-1, brought to units of the weight, into the buffers."""

    @abstractmethod
    def spread(self, columns_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale (B, K) and factor (B, K, R) of the logits' Gaussian for columns [f; 1] (B, D + 1)."""

    @abstractmethod
    def sample(self, num_samples: int) -> Tensor:
        """Return draws (S, K, D + 1) of the weight less its mean, from torch's random state."""

    @abstractmethod
    def marginal_scale(self) -> Tensor:
        """Return the standard deviation (K, D + 1) of each weight."""


class Diagonal(Covariance):
    """Independent weights: h_kd = sum_n p_nk (1 - p_nk) g_nd^2."""

    rank = 0

    def __init__(self, prior_scale_KD: Tensor, fraction: float) -> None:
        super().__init__(prior_scale_KD, fraction)
        self.register_buffer("scale_KD", fraction * prior_scale_KD)

    def new_sums(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return zeros (K, D + 1)."""
        return (torch.zeros(self.num_classes, self.num_columns, dtype=torch.float64, device=device),)

    def add(self, sums: tuple[Tensor, ...], probability_BK: Tensor, columns_BD: Tensor) -> None:
        """Add sum_n p (1 - p) g^2."""
        sums[0].addmm_((probability_BK * (1 - probability_BK)).T, columns_BD.square())

    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        """Return the diagonal itself."""
        return Eigen(sums[0], ())

    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        """Write the standard deviations."""
        self.get_buffer("scale_KD").copy_(prior_scale_D * (eigen.values + precision).rsqrt())

    def spread(self, columns_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits' standard deviations; there is no factor."""
        scale_BK = product(columns_BD.square(), self.get_buffer("scale_KD").square().T).sqrt()
        return scale_BK, scale_BK.new_empty((*scale_BK.shape, 0))

    def sample(self, num_samples: int) -> Tensor:
        """Return scale * noise."""
        return self.get_buffer("scale_KD") * _noise(self.get_buffer("scale_KD"), num_samples)

    def marginal_scale(self) -> Tensor:
        """Return the buffer."""
        return self.get_buffer("scale_KD").clone()


class Kronecker(Covariance):
    """The Kronecker product of a class factor and a feature factor, damped per pair of their eigenvectors."""

    def __init__(self, prior_scale_KD: Tensor, fraction: float) -> None:
        super().__init__(prior_scale_KD, fraction)
        self.rank = self.num_classes
        self.register_buffer("class_basis_KK", torch.eye(self.num_classes))
        self.register_buffer("feature_basis_DD", torch.diag(prior_scale_KD[0]))
        self.register_buffer("scale_KD", torch.full_like(prior_scale_KD, fraction))

    def new_sums(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return zeros (K, K) and (D + 1, D + 1)."""
        sizes = (self.num_classes, self.num_columns)
        return tuple(torch.zeros(size, size, dtype=torch.float64, device=device) for size in sizes)

    def add(self, sums: tuple[Tensor, ...], probability_BK: Tensor, columns_BD: Tensor) -> None:
        """Add sum_n L_n and sum_n g_n g_n'."""
        sums[0].diagonal().add_(probability_BK.sum(0))
        sums[0].addmm_(probability_BK.T, probability_BK, alpha=-1)
        sums[1].addmm_(columns_BD.T, columns_BD)

    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        """Return the products of the factors' eigenvalues, and both bases."""
        (values_K, basis_KK), (values_D, basis_DD) = (_eigh(factor) for factor in sums)
        return Eigen(values_K[:, None] * values_D / num_images, (basis_KK, basis_DD))

    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        """Write both bases, and the standard deviation along each pair of their columns."""
        self.get_buffer("class_basis_KK").copy_(eigen.bases[0])
        self.get_buffer("feature_basis_DD").copy_(prior_scale_D[:, None] * eigen.bases[1])
        self.get_buffer("scale_KD").copy_((eigen.values + precision).rsqrt())

    def spread(self, columns_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class basis times the standard deviation along each of its columns as the factor."""
        projected_BD = product(columns_BD, self.get_buffer("feature_basis_DD"))
        scale_BK = product(projected_BD.square(), self.get_buffer("scale_KD").square().T).sqrt()
        return torch.zeros_like(scale_BK), self.get_buffer("class_basis_KK") * scale_BK.unsqueeze(1)

    def sample(self, num_samples: int) -> Tensor:
        """Return noise, scaled along each pair of eigenvectors."""
        scale_KD = self.get_buffer("scale_KD")
        coordinates_SKD = scale_KD * _noise(scale_KD, num_samples)
        return self.get_buffer("class_basis_KK") @ coordinates_SKD @ self.get_buffer("feature_basis_DD").T

    def marginal_scale(self) -> Tensor:
        """Return the root of the diagonal."""
        bases = self.get_buffer("class_basis_KK").square(), self.get_buffer("feature_basis_DD").square()
        return (bases[0] @ self.get_buffer("scale_KD").square() @ bases[1].T).sqrt()


class Full(Covariance):
    """All covariances between the M = K (D + 1) weights, kept as a root: covariance = root root'."""

    def __init__(self, prior_scale_KD: Tensor, fraction: float) -> None:
        super().__init__(prior_scale_KD, fraction)
        self.rank = self.num_classes
        root_KDM = torch.diag(fraction * prior_scale_KD.flatten()).view(*prior_scale_KD.shape, -1)
        self.register_buffer("root_KDM", root_KDM)

    def new_sums(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return zeros (M, M)."""
        size = self.num_classes * self.num_columns
        return (torch.zeros(size, size, dtype=torch.float64, device=device),)

    def add(self, sums: tuple[Tensor, ...], probability_BK: Tensor, columns_BD: Tensor) -> None:
        """Add sum_n diag(p_n) (x) g_n g_n', less that of p_n (x) g_n with itself."""
        weighted_BKD = probability_BK.unsqueeze(-1) * columns_BD.unsqueeze(1)
        sums[0].addmm_(weighted_BKD.flatten(1).T, weighted_BKD.flatten(1), alpha=-1)
        blocks_KDD = weighted_BKD.permute(1, 2, 0) @ columns_BD
        shape = (self.num_classes, self.num_columns) * 2
        sums[0].view(shape).diagonal(dim1=0, dim2=2).add_(blocks_KDD.permute(1, 2, 0))

    def eigen(self, sums: tuple[Tensor, ...], num_images: int) -> Eigen:
        """Return eigenvalues and eigenvectors."""
        values_M, basis_MM = _eigh(sums[0])
        return Eigen(values_M, (basis_MM,))

    def store(self, eigen: Eigen, precision: float, prior_scale_D: Tensor) -> None:
        """Write the eigenvectors, scaled to a root."""
        basis_KDM = eigen.bases[0].view(self.num_classes, self.num_columns, -1)
        self.get_buffer("root_KDM").copy_(prior_scale_D[:, None] * basis_KDM * (eigen.values + precision).rsqrt())

    def spread(self, columns_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of each image's K x K covariance.

        The products of the root are rounded, their square is not: it is formed in float64 where there is one, so that
        it is positive definite. What is added to its diagonal only covers rounding, and no error is ever asked for.
        """
        root_KDM = self.get_buffer("root_KDM")
        projected_BKM = product(columns_BD, root_KDM.transpose(0, 1).flatten(1)).unflatten(1, (self.num_classes, -1))
        exact_BKM = projected_BKM if projected_BKM.device.type == "mps" else projected_BKM.double()
        covariance_BKK = exact_BKM @ exact_BKM.mT
        diagonal_BK = covariance_BKK.diagonal(dim1=1, dim2=2)
        rounding = 10 * self.num_classes * torch.finfo(covariance_BKK.dtype).eps
        raised_BKK = covariance_BKK + torch.diag_embed(
            rounding * diagonal_BK.mean(1, keepdim=True).expand_as(diagonal_BK)
        )
        factor_BKK = torch.linalg.cholesky_ex(raised_BKK).L.to(projected_BKM.dtype)
        return torch.zeros_like(factor_BKK[..., 0]), factor_BKK

    def sample(self, num_samples: int) -> Tensor:
        """Return root times noise."""
        root_KDM = self.get_buffer("root_KDM")
        return torch.einsum("kdm,sm->skd", root_KDM, _noise(root_KDM[0, 0], num_samples))

    def marginal_scale(self) -> Tensor:
        """Return the norms of the root's rows."""
        return self.get_buffer("root_KDM").square().sum(-1).sqrt()


STRUCTURES: dict[StructureName, type[Covariance]] = {"diagonal": Diagonal, "kronecker": Kronecker, "full": Full}


def cost(structure: StructureName, num_classes: int, num_features: int, num_examples: int) -> Cost:
    """Return what a structure needs for K classes, D features and N training images.

    Example:
        >>> cost("full", 10, 512, 50_000).stored_bytes / 2**20
        100.39...
    """
    num_columns = num_features + 1
    num_weights = num_classes * num_columns
    if structure == "diagonal":
        return Cost(4 * num_weights, 8 * num_weights, num_examples * num_weights)
    sides = (num_classes, num_columns) if structure == "kronecker" else (num_weights,)
    squares, cubes = sum(side**2 for side in sides), sum(side**3 for side in sides)
    # Matrix, eigenvectors, and twice that as workspace; about ten multiplications per row, column and eigenvector.
    stored = 4 * (squares + (num_weights if structure == "kronecker" else 0))
    return Cost(stored, 4 * 8 * squares, num_examples * squares + 10 * cubes)


def require_fits(structure: StructureName, num_classes: int, num_features: int) -> None:
    """Raise ConfigError where a structure is too large, naming the numbers and what to use instead."""
    num_columns = num_features + 1
    side = num_classes * num_columns if structure == "full" else num_columns
    alternative = {"full": "kronecker", "kronecker": "diagonal", "diagonal": "diagonal"}[structure]
    where, hint = f"inference.structure = {structure}", f'use inference.structure = "{alternative}"'
    most = MAX_CLASSES[structure]
    require(num_classes <= most, f"{num_classes} classes, at most {most} can be", where=where, hint=hint)
    gib = cost(structure, num_classes, num_features, 0).peak_bytes / 2**30
    what = f"the eigenvectors of a matrix of {side} rows take {gib:.1f} GiB, at most {MAX_MATRIX} rows can be"
    require(structure == "diagonal" or side <= MAX_MATRIX, what, where=where, hint=hint)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors of a positive semi-definite matrix: rounding may make some negative."""
    values, basis = torch.linalg.eigh(matrix)
    return values.clamp_min(0), basis


def _noise(like: Tensor, num_samples: int) -> Tensor:
    """Return standard normal noise, S of the given shape."""
    return torch.randn(num_samples, *like.shape, dtype=like.dtype, device=like.device)
