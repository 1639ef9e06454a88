"""The repository in a real Triton: pictures over HTTP are those of Pipeline, value by value.

Runs where TRITON_ENV names a virtual environment with nvidia-pytriton, tritonclient[http], onnxruntime, tokenizers,
pillow, rich and filelock. PyTriton 0.7.0 has a whole tritonserver (2.51.0) in its wheel, with the Python backend alone,
and works with the system's Python 3.11 of Debian 12 only. So `stand_in.py` takes the place of ONNX Runtime's backend.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from urllib.request import urlopen

import numpy as np
import pytest

from ditc.runtime.pipeline import Pipeline
from ditc.runtime.request import Request
from ditc.runtime.triton_server.repository import Choices, write_repository

pytestmark = pytest.mark.scale
PATIENCE_S = 120.0
ROOT = Path(__file__).parents[3]
CASES = [
    {"prompt": "red cat", "seed": 1, "height": 64, "width": 64, "num_inference_steps": 2},
    {
        "prompt": "blue dog",
        "seed": 2,
        "height": 64,
        "width": 96,
        "num_inference_steps": 3,
        "guidance_scale": 3.3,
    },
]
CLIENT = """
import json, sys
import numpy as np
import tritonclient.http as http
client = http.InferenceServerClient(sys.argv[1], network_timeout=100, connection_timeout=100)
TYPES = {str: (object, "BYTES"), int: (np.int64, "INT64"), float: (np.float64, "FP64")}
for number, case in enumerate(json.loads(sys.argv[2])):
    inputs = []
    for name, value in case.items():
        dtype, kind = TYPES[type(value)]
        inputs.append(http.InferInput(name, [1, 1], kind))
        inputs[-1].set_data_from_numpy(np.array([[value.encode() if kind == "BYTES" else value]], dtype))
    np.save(f"{sys.argv[3]}/{number}.npy", client.infer("tiny", inputs).as_numpy("image"))
"""


@pytest.fixture
def environment() -> Path:
    if "TRITON_ENV" not in os.environ:
        pytest.skip("TRITON_ENV names no virtual environment with nvidia-pytriton")
    return Path(os.environ["TRITON_ENV"])


@pytest.fixture
def address(environment: Path, tiny_bundle: Path, tmp_path: Path) -> Iterator[str]:
    """A tritonserver on loopback, with the repository of tiny_bundle."""
    repository = tmp_path / "repository"
    for name in write_repository(tiny_bundle, repository, Choices(name="tiny", kind="CPU"))[1:]:
        config = repository / name / "config.pbtxt"
        config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))
        (version,) = (path for path in (repository / name).iterdir() if path.is_dir())
        shutil.copyfile(Path(__file__).with_name("stand_in.py"), version / "model.py")
    packages = next((environment / "lib").glob("python3.*")) / "site-packages"
    # Its Python ignores PYTHONPATH.
    (packages / "ditc-under-test.pth").write_text(f"{ROOT / '.types'}\n")
    wheel = packages / "pytriton" / "tritonserver"
    backends = Path(shutil.copytree(wheel / "backends", tmp_path / "backends"))
    stub = next((wheel / "python_backend_stubs").glob("3.11/*"))
    shutil.copy(stub, backends / "python")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ["PATH"] = f"{environment / 'bin'}:{environ['PATH']}"
    environ["LD_LIBRARY_PATH"] = str(packages / "nvidia_pytriton.libs")
    options = ["--http-address", "127.0.0.1", "--http-port", str(port), "--allow-grpc", "false"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                wheel / "bin" / "tritonserver",
                "--model-repository",
                repository,
                "--backend-directory",
                backends,
                *options,
                "--allow-metrics",
                "false",
            ],
            env=environ,
            stdout=log,
            stderr=log,
        )
        try:
            begin = monotonic()
            while True:
                assert process.poll() is None and monotonic() - begin < PATIENCE_S, (
                    tmp_path / "log"
                ).read_text()
                try:
                    if urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).status == 200:
                        break
                except OSError:
                    sleep(0.1)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)
            (packages / "ditc-under-test.pth").unlink()


def test_a_real_triton_draws_the_pictures_of_pipeline(
    environment: Path, address: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    command = [environment / "bin" / "python", "-c", CLIENT, address, json.dumps(CASES), tmp_path]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, timeout=PATIENCE_S, env=environ)
    for number, case in enumerate(CASES):
        alone = pipeline.draw(Request(**case)).images[0]  # type: ignore[arg-type]
        assert np.array_equal(np.load(tmp_path / f"{number}.npy")[0], np.asarray(alone))
