"""Every file is opened through `open_regular`: the sources are searched for calls that open a path in another way.

Opening a pipe in the place of a file would block forever, and a signal would not end it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT
from tests.project.source_calls import full_name, imported

PACKAGE = ROOT / "d2v_fast"
# functions that open the path that they are given, by their last name, and methods of paths that do
OPENERS = {
    *("open", "fdopen", "read_text", "read_bytes", "ZipFile", "GzipFile", "BZ2File", "LZMAFile", "safe_open"),
    *("load_file", "fromfile", "memmap", "loadtxt", "genfromtxt", "mmap", "SoundFile", "ParquetFile", "read_table"),
    *(
        "memory_map",
        "OSFile",
        "input_stream",
        "from_file",
        "from_pretrained",
        "copyfile",
        "copytree",
        "copy2",
        "getlines",
    ),
}
# of these the module decides, for others have functions of that name
QUALIFIED = {"torch.load", "numpy.load", "json.load", "shutil.copy", "fileinput.input", "zipfile.Path"}
# functions of d2v_fast.files.reading, which may be called as such
OURS = {"d2v_fast.files.reading.read_text", "d2v_fast.files.reading.read_bytes"}
WRITES = {"w", "wb", "x", "xb"}
# calls that open what is no path of anybody else's, or what was opened by `open_regular`; by module
ALLOWED = {
    # the home of open_regular
    "files.reading": {
        "os.open(path, flags, 438)",
        *("open(_regular_handle(path, flags), 'rb')", "open(_regular_handle(path, flags), 'ab')"),
        *("read_bytes(path, max_bytes, below=below)", "read_text(path, max_bytes, below=below)"),
    },
    # files of the system
    "command_lines": {"(folder / 'cmdline').read_bytes()", "(folder / 'stat').read_text()"},
    "commands.doctor": {"Path('/sys/fs/cgroup/cpu.max').read_text()"},
    "memory.peak": {"_MEMORY.read_text()", "_STATUS.read_text()"},
    "processes.idle": {
        *("(task / 'stat').read_text(errors='replace')", "(task / 'io').read_text()"),
        "Path('/proc/self/status').read_text()",
    },
    "processes.state": {
        "(task / 'children').read_text()",
        "(_PROCESSES / str(pid) / 'stat').read_text(errors='replace')",
    },
    # files of the package
    "modalities.speech.samples": {"(FOLDER / 'index.tsv').read_text(encoding='utf-8')"},
    "config.presets": {"(PRESETS / f'{name}.json').read_text(encoding='utf-8')"},
    # open files and bytes in memory
    "modalities.speech.decode": {"soundfile.SoundFile(source, closefd=False)"},
    "modalities.vision.bit_depth": {"Image.open(io.BytesIO(content), formats=('PNG', 'TIFF'))"},
    "modalities.vision.decode": {
        "Image.open(file, formats=FORMATS)",
        "Image.open(io.BytesIO(content), formats=FORMATS)",
    },
    "modalities.text.streams": {"gzip.GzipFile(fileobj=file)"},
    "modalities.text.parquet": {"arrow.parquet.ParquetFile(file, buffer_size=READ_AHEAD)"},
    "modalities.text.tokens": {"np.fromfile(file, dtype='<i8')", "np.memmap(file, dtype=self._dtype, mode='r')"},
    "interop.fairseq_files": {"torch.load(file, map_location='cpu', weights_only=True)"},
    "interop.pickle_files": {"zipfile.ZipFile(file)", "archive.open(entry)"},
    "checkpoints.shard_files": {"safe_open(f'/proc/self/fd/{self._handle}', framework='pt')"},
    # checked before
    "interop.folders": {"safe_open(path, framework='pt')"},
    "files.outputs": {
        "(target / 'README.md').read_bytes()",
        *("os.open(aside, os.O_RDONLY | os.O_DIRECTORY)", "os.open(leftover, os.O_RDONLY | os.O_DIRECTORY)"),
    },
    "training.run_folder": {"(path / 'lock').open('a+', encoding='utf-8', errors='replace')"},
    # written before
    "files.atomic": {"os.open(path, os.O_RDONLY)"},
    "training.metrics": {"(folder.path / LOG).open('a', encoding='utf-8')"},
    # a pipe of its own, and what takes anything
    "processes.signals": {"os.open(os.devnull, os.O_WRONLY)", "open(reading, 'rb', buffering=0)"},
    # for the lock alone, without waiting
    "checkpoints.hold": {
        "os.open(path, os.O_RDONLY | os.O_NONBLOCK)",
        "os.open(checkpoint / _MANIFEST, access | os.O_NONBLOCK)",
    },
    # for reading and writing, which waits for nobody
    "data.cache": {"os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 438)"},
    # written
    "commands.embed": {"zipfile.ZipFile(path, 'w')"},
    # a function of that name
    "training.prepare": {"RunFolder.open(config, world, resume=resume, stem=stem)"},
}


def opened(text: str) -> Iterator[tuple[int, str]]:
    """Line and source of every call that opens a path, other than to write a new file."""
    tree = ast.parse(text)
    names = dict(imported(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else name.rpartition(".")[2]
        if isinstance(node.func, ast.Name):
            last = last or node.func.id
        if name in OURS or (last not in OPENERS and name not in QUALIFIED):
            continue
        mode = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        if last == "open" and any(isinstance(one, ast.Constant) and one.value in WRITES for one in mode):
            continue
        yield node.lineno, ast.unparse(node)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_file_is_opened_through_open_regular() -> None:
    for path in sources():
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        allowed = ALLOWED.get(module, set())
        found = list(opened(path.read_text(encoding="utf-8")))
        assert [f"{line}: {call}" for line, call in found if call not in allowed] == [], path
        # what is allowed is there
        assert allowed <= {call for _, call in found}, path


@pytest.mark.parametrize(
    "text",
    [
        "open(path)",
        "open(path, 'rb')",
        "with open(path, mode='a') as file:\n    pass",
        "path.open()",
        "path.open('rb')",
        "path.read_text()",
        "Path(name).read_bytes()",
        "import os\nos.open(path, os.O_RDONLY)",
        "from io import open as read\nread(path)",
        "from safetensors import safe_open\nsafe_open(path, framework='pt')",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.memmap(path)",
        "import torch\ntorch.load(path, weights_only=True)",
        "from PIL import Image\nImage.open(path)",
        "import soundfile\nsoundfile.SoundFile(path)",
        "Tokenizer.from_file(path)",
        "AutoModel.from_pretrained(path)",
        "import pyarrow.parquet as pq\npq.ParquetFile(path)",
        "import shutil\nshutil.copyfile(a, b)",
    ],
)
def test_calls_that_open_a_path_are_found(text: str) -> None:
    assert len(list(opened(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "open(path, 'w')",
        "open(path, 'xb', buffering=9)",
        "path.open('w', encoding='utf-8')",
        "path.write_text(text)",
        "from d2v_fast.files.reading import read_text\nread_text(path, 9)",
        "from d2v_fast.files.reading import open_regular\nopen_regular(path)",
        "import copy\ncopy.copy(model)",
    ],
)
def test_other_calls_are_none(text: str) -> None:
    assert list(opened(text)) == []
