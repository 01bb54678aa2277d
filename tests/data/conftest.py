import os
import tarfile
from pathlib import Path

import pytest


def shared_data() -> Path:
    """The folder of larger test data: the environment's KDJAX_TEST_DATA, else shared/data beside the repository."""
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    return Path(os.environ.get("KDJAX_TEST_DATA", beside))


@pytest.fixture(scope="session")
def fashion_mnist_dir(tmp_path_factory):
    """A data_dir with Fashion-MNIST as tensorflow-datasets prepares it."""
    archive = shared_data() / "tfds" / "fashion_mnist-3.0.1-array_record.tar.xz"
    if not archive.exists():
        pytest.skip(f"Fashion-MNIST is not here: set KDJAX_TEST_DATA to a folder with tfds/{archive.name}")
    folder = tmp_path_factory.mktemp("tfds")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder
