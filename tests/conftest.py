"""Shared fixtures: published results, weights generated from names, and relative errors.

Tests read the goldens in `assets/goldens`. If MOESR_REFERENCE names the directory of the whole set of
reference data, they read its complete arrays instead.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import own_cores  # noqa: F401  # before the libraries that count cores for their threads

# Triton reads this when it is imported: 1 runs kernels in its interpreter on a CPU, 0 on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from make_goldens import GOLDENS, STEMS, sample
from weights_of_names import weights

from moesr.runtime.backends.selection import BACKENDS
from moesr.runtime.system.relative_error import relative_l2
from moesr.training.networks import Autoencoder

pytest_plugins = ("service_fixtures", "cluster_fixtures")

REPO = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ["MOESR_REFERENCE"]) if os.environ.get("MOESR_REFERENCE") else None
STABLESR = "stablesr_"  # prefix of the names of its networks
BACKEND = os.environ.get("MOESR_TEST_BACKEND", "onnxruntime")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that reads a golden with `golden`, and run the tests that need a cluster last.

    The servers of a cluster run until the session ends, and would take time from other tests.
    """
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.add_marker("golden")
    items.sort(key=lambda item: "s3" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape bytes of file names in captured output, which `pytest -n` could not send to its main process."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session", autouse=True)
def one_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give tests that choose no backend only one, and keep all tests from writing to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOESR_CACHE", str(tmp_path_factory.mktemp("cache")))
        for name in BACKENDS.keys() - {BACKEND}:
            patch.delitem(BACKENDS, name)
        yield


@pytest.fixture(scope="module", autouse=True)
def no_preview_runs(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep exports from running their engines for the colors of previews, except in the tests of that."""
    package = sys.modules.get("moesr.export.package")
    with pytest.MonkeyPatch.context() as patch:
        if package is not None and "preview" not in request.module.__name__:
            patch.setattr(package, "preview_map", lambda *_: None)
        yield


class Golden(dict[str, np.ndarray]):
    """The arrays of one golden file by name. Large results are sampled unless the whole set is read."""

    def pair(self, key: str, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `got` and the golden result `key` at the elements that the file holds."""
        want = self[key]
        return (got if got.shape == want.shape else sample(got)), want

    def error(self, key: str, got: np.ndarray) -> float:
        """Return the relative L2 error of `got` at the elements that the file holds of the result `key`."""
        return relative_l2(*self.pair(key, got))


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Return a function that loads a golden file by its stem: `golden("unet_w32")["eps"]`."""

    def load(stem: str) -> Golden:
        in_whole_set = REFERENCE is not None and stem in STEMS
        with np.load((REFERENCE / "golden" if in_whole_set else GOLDENS) / f"{stem}.npz") as data:
            return Golden(data)

    return load


@pytest.fixture(scope="session")
def published_weights() -> Callable[[str, str], dict[str, np.ndarray]]:
    """Return a function that makes a network's weights: `published_weights("unet_w32", "dev")`."""

    def make(network: str, salt: str) -> dict[str, np.ndarray]:
        return weights(own_shapes(network), salt)

    return make


def own_shapes(network: str) -> dict[str, list[int]]:
    """Return the shapes of the tensors of our network of these sizes, by name."""
    from stablesr import NETWORKS

    from moesr.training.config import KL_F8, AutoencoderConfig, UNetConfig
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
            "sd15_decoder_c32": (Autoencoder, dataclasses.replace(KL_F8, channels=32)),
            "sd15_decoder_c128": (Autoencoder, KL_F8),
        }[network]
    )
    return {key: list(tensor.shape) for key, tensor in meta_network(kind, config).state_dict().items()}
