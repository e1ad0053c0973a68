"""Public data sets: CIFAR-10, CIFAR-100, MNIST, Fashion-MNIST and SVHN, downloaded once and checked against a hash.

The official test images are the test split; validation and calibration are carved from the official training images.
Only the hashes are pinned, so anybody can put the original files into the folder by hand, wherever they came from.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from bayesnet import weights
from bayesnet.data.archives import Arrays, read_cifar, read_mnist, read_svhn
from bayesnet.data.assembly import assemble, fixed_channels
from bayesnet.data.dataset import DataConfig, DataSource, ImageData
from bayesnet.data.examples import ArrayExamples
from bayesnet.data.preprocessing import Preprocessing
from bayesnet.errors import ConfigError, DataError
from bayesnet.weights import Fetched

_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class PublicFile(NamedTuple):
    """A file of a data set.

    Attributes:
        url: Where it is published; the last part is its name on disk.
        sha256: Of its contents, 64 hexadecimal digits.
    """

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """Name on disk."""
        return self.url.rpartition("/")[2]


class PublicSet(NamedTuple):
    """A row of the table of public data sets.

    Attributes:
        files: What to download.
        parse: From what was fetched, in the order of ``files``, to the official training and test part.
        classes: Names in index order.
        channels: 1 (grey) or 3 (RGB).
        side: Height and width, pixels.
        description: One line for listings.
    """

    files: tuple[PublicFile, ...]
    parse: Callable[[Sequence[Fetched]], tuple[Arrays, Arrays]]
    classes: tuple[str, ...]
    channels: int
    side: int
    description: str


def load_public(name: str, config: DataConfig, argument: str, preprocessing: Preprocessing | None) -> ImageData:
    """Return a public data set in four splits, downloading it if it is not there.

    Args:
        name: A name of SETS.
        config: The section ``data``; the files lie in ``root/NAME``, by default ``data/NAME`` of the cache folder.
        argument: Unused; the data sets take no path.
        preprocessing: That of a run, or None to make it from the training split.

    Raises:
        ConfigError: Another image size, other channels or a preset is asked for.
        DataError: A file cannot be had or is not the official one, or a fraction leaves a class without an example.
    """
    public = SETS[name]
    channels = fixed_channels(name, config, preprocessing, channels=public.channels, side=public.side)
    parts = dict(zip(("train", "test"), public.parse(_files(name, public, config)), strict=True))
    digest = hashlib.sha256()
    sources = {}
    for split, (images_NCHW, labels_N) in parts.items():
        _check_arrays(name, public, images_NCHW, labels_N)
        digest.update(images_NCHW.tobytes())
        digest.update(labels_N.astype("<i8").tobytes())
        pixels_NCHW = torch.from_numpy(images_NCHW).expand(-1, channels, -1, -1)
        sources[split] = ArrayExamples(pixels_NCHW, torch.from_numpy(labels_N), prefix=f"{name} {split} image")
    note = f"The test split is the official one; validation and calibration are carved by class and seed {config.seed}."
    return assemble(
        name, sources, public.classes, digest.digest(), config=config, preprocessing=preprocessing, notes=[note]
    )


def _files(name: str, public: PublicSet, config: DataConfig) -> list[Fetched]:
    """Return the files, all of them with the right hash."""
    try:
        root = Path(config.root).expanduser() if config.root else weights.cache_folder() / "data"
    except RuntimeError as error:
        raise ConfigError("cannot find the home folder", where=config.root) from error
    # A folder for each: the files of MNIST and Fashion-MNIST have the same names.
    return [weights.fetch(file.url, root / name, sha256=file.sha256, file_name=file.name) for file in public.files]


def _check_arrays(name: str, public: PublicSet, images_NCHW: NDArray[np.uint8], labels_N: NDArray[np.int64]) -> None:
    """Raise DataError unless images and labels are what the table says."""
    shape = (len(labels_N), public.channels, public.side, public.side)
    if images_NCHW.shape != shape or len(labels_N) == 0:
        raise DataError(f"{name} has images of another shape than expected", where=images_NCHW.shape, hint=str(shape))
    if labels_N.min() < 0 or labels_N.max() >= len(public.classes):
        raise DataError(f"{name} has a label that is no class", where=f"{labels_N.min()} to {labels_N.max()}")


def _idx_files(base: str, hashes: Sequence[str]) -> tuple[PublicFile, ...]:
    """Return the four files of MNIST or a set like it."""
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    return tuple(PublicFile(f"{base}/{name}", sha256) for name, sha256 in zip(names, hashes, strict=True))


# The hashes are those of tensorflow-datasets, torchvision's prototype data sets and Keras, which agree; the URLs are
# the official ones, or, where those have no https, mirrors of the same bytes.
SETS: dict[str, PublicSet] = {
    "cifar10": PublicSet(
        files=(
            PublicFile(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
        parse=functools.partial(
            read_cifar,
            folder="cifar-10-batches-py",
            train=[f"data_batch_{number}" for number in range(1, 6)],
            test="test_batch",
            labels=b"labels",
        ),
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        channels=3,
        side=32,
        description="60,000 colour photographs, 32 x 32, 10 classes (download: 170 MB)",
    ),
    "cifar100": PublicSet(
        files=(
            PublicFile(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            ),
        ),
        parse=functools.partial(
            read_cifar, folder="cifar-100-python", train=["train"], test="test", labels=b"fine_labels"
        ),
        classes=tuple(_CIFAR100.split()),
        channels=3,
        side=32,
        description="60,000 colour photographs, 32 x 32, 100 classes (download: 169 MB)",
    ),
    "mnist": PublicSet(
        files=_idx_files(
            "https://ossci-datasets.s3.amazonaws.com/mnist",
            (
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
        parse=read_mnist,
        classes=tuple("0123456789"),
        channels=1,
        side=28,
        description="70,000 handwritten digits, 28 x 28, 10 classes (download: 12 MB)",
    ),
    "fashion_mnist": PublicSet(
        files=_idx_files(
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
            (
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
        parse=read_mnist,
        classes=_FASHION,
        channels=1,
        side=28,
        description="70,000 pictures of clothes, 28 x 28, 10 classes (download: 31 MB)",
    ),
    "svhn": PublicSet(
        files=(
            PublicFile(
                "https://ufldl.stanford.edu/housenumbers/train_32x32.mat",
                "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            ),
            PublicFile(
                "https://ufldl.stanford.edu/housenumbers/test_32x32.mat",
                "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
            ),
        ),
        parse=read_svhn,
        classes=tuple("0123456789"),
        channels=3,
        side=32,
        description="99,289 digits of house numbers in colour, 32 x 32, 10 classes (download: 246 MB)",
    ),
}

PUBLIC: Mapping[str, DataSource] = {
    name: DataSource(functools.partial(load_public, name), takes_path=False, description=public.description)
    for name, public in SETS.items()
}
