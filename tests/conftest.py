"""Shared fixtures: published results, weights made from names, and how closely two results agree.

The whole set of reference data is a directory beside the project; parts of it lie in `assets/goldens`. Tests
of what is only in the whole set are skipped without it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Triton reads this when it is imported; kernels then run on a CPU. 0 tests them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from make_goldens import GOLDENS
from weights_of_names import weights

from moesr.runtime.backends.selection import BACKENDS
from moesr.training.networks import Autoencoder

REPO = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("MOESR_REFERENCE", REPO.parent / "shared" / "reference"))
STABLESR = "stablesr_"  # before the names of its networks
BACKEND = os.environ.get("MOESR_TEST_BACKEND", "onnxruntime")
WITHOUT = f"not among the project's goldens, and no reference data at {REFERENCE}; set MOESR_REFERENCE"


@pytest.fixture(scope="session", autouse=True)
def one_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where tests leave the choice there is but one backend, and nothing goes to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESR_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in BACKENDS.keys() - {BACKEND}:
            patch.delitem(BACKENDS, name)
        yield


class Golden(dict[str, np.ndarray]):
    """Arrays of one golden file by name; a test that asks for one that is not there is skipped."""

    def __missing__(self, key: str) -> np.ndarray:
        pytest.skip(f"{key}: {WITHOUT}")

    def thinned(self, array: np.ndarray) -> np.ndarray:
        """The pixels [..., H, W] that the file holds of a result: all, or those that `make_goldens` keeps."""
        return array[..., self.pixels, self.pixels]

    @property
    def leeway(self) -> float:
        """Times a limit on the relative error: that of a few pixels strays from that of a whole image."""
        return 2.0 if "every" in self else 1.0

    @property
    def pixels(self) -> slice:
        """The rows, and the columns, that the file holds of a result."""
        every = int(self.get("every", 1))
        return slice(every // 2, None, every)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Load one golden file by stem: `golden("unet_w32")["eps"]`."""

    def load(stem: str) -> Golden:
        for folder in (REFERENCE / "golden", GOLDENS):
            if (folder / f"{stem}.npz").is_file():
                with np.load(folder / f"{stem}.npz") as data:
                    return Golden(data)
        pytest.skip(f"{stem}: {WITHOUT}")

    return load


@pytest.fixture(scope="session")
def published_weights() -> Callable[[str, str], dict[str, np.ndarray]]:
    """Weights of a published network: `published_weights("unet_w32", "dev")`."""

    def make(network: str, salt: str) -> dict[str, np.ndarray]:
        return weights(published_shapes(network), salt)

    return make


def published_shapes(network: str) -> dict[str, list[int]]:
    """Shapes of a published network's tensors by name; without the reference data, our network's."""
    family = "stablesr_keys" if network.startswith(STABLESR) else "checkpoint_keys"
    keys = REFERENCE / f"{family}.json"
    if not keys.is_file():
        return own_shapes(network)
    return json.loads(keys.read_text())[network.removeprefix(STABLESR)]


def own_shapes(network: str) -> dict[str, list[int]]:
    """Shapes of the tensors that our network of these sizes has, by name."""
    from stablesr import NETWORKS

    from moesr.training.config import AutoencoderConfig, UNetConfig
    from moesr.training.networks import DenoisingUNet
    from moesr.training.weights import meta_network

    kind, config = (
        NETWORKS.get(network.removeprefix(STABLESR))
        or {
            "unet_w32": (DenoisingUNet, UNetConfig(width=32)),
            "unet_w160": (DenoisingUNet, UNetConfig()),
            "ldm_unet_w32": (DenoisingUNet, UNetConfig(width=32, space_experts=0)),
            "decoder_c32": (Autoencoder, AutoencoderConfig(channels=32, codebook_size=256)),
            "decoder_c128": (Autoencoder, AutoencoderConfig()),
        }[network]
    )
    return {key: list(tensor.shape) for key, tensor in meta_network(kind, config).state_dict().items()}


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||, in float64."""
    got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got64 - want64) / np.linalg.norm(want64))
