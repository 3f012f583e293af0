"""A broken package that is not needed is ignored or reported in one line, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_fast.evaluation import run as evaluation
from d2v_fast.training import metrics
from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, run_forked, tiny_file

BROKEN = {
    # what a torchvision built for another torch says
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
    # not NVIDIA's: the package of that name on PyPI is something else
    "apex": "from pyramid.session import UnencryptedCookieSessionFactoryConfig",
    "xformers": "raise ImportError('undefined symbol')",
    "flash_attn": "raise ImportError('undefined symbol')",
    "transformers": "raise RuntimeError('Failed to import because torchvision is broken')",
    # as of a protobuf that is too new
    "tensorboard": "raise TypeError('Descriptors cannot be created directly.')",
    "matplotlib": "raise ImportError('numpy.core.multiarray failed to import')",
    # scikit-learn looks for it too, and bears only an ImportError
    "rich": "raise ImportError('cannot import name Progress')",
}


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder for the front of `sys.path` in which every one of these packages is broken."""
    folder = tmp_path / "broken"
    for name, code in BROKEN.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code)
    return folder


def test_plain_run(broken: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"

    def put_in_front() -> None:
        sys.path.insert(0, str(broken))
        for name in list(sys.modules):
            if name.partition(".")[0] in BROKEN or name.startswith("torch.utils.tensorboard"):
                del sys.modules[name]
        metrics._said.clear()
        evaluation.has_labels = lambda config: False
        sys.stdout.isatty = lambda: True  # type: ignore[method-assign]

    file = tiny_file(tmp_path, d2v__schedule={"steps": 3}, d2v__run__save_every=1)
    assert run_forked("--ds_config", file, "--run", "r", output=output, before=put_in_front) == [0], output.read_text()
    said = output.read_text()
    assert said.count("no TensorBoard events: tensorboard cannot be imported (TypeError: Descriptors cannot be") == 1
    assert said.count("no curves.png: matplotlib cannot be imported (ImportError: numpy.core.multiarray failed") == 1
    assert said.count("no progress bar: rich cannot be imported (ImportError: cannot import name Progress)") == 1
    assert "Traceback" not in said
    assert len(figures(tmp_path, "r")) == 3
    assert (tmp_path / "runs/r/export/model.safetensors").is_file()


@pytest.mark.slow
@needs_deepspeed
def test_run_with_deepspeed(broken: Path, tmp_path: Path) -> None:
    """In a fresh interpreter: DeepSpeed looks for some of them itself."""
    file = tiny_file(tmp_path, d2v__schedule={"steps": 2}, zero_optimization__stage=1)
    path = f"{broken}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "d2v_fast/train.py", "--ds_config", str(file), "--run", "r"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(figures(tmp_path, "r")) == 2
