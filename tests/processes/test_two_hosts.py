"""Two hosts on one machine: network namespaces joined by a virtual cable, which is cut."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.marks import needs_deepspeed
from tests.helpers.runs import figures, leave_out_reports, logged_steps, processes, run_forked, tiny_file, until

pytestmark = [
    pytest.mark.waits,
    pytest.mark.slow,
    needs_deepspeed,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="needs `ip` (package iproute2)"),
]

# documentation addresses (RFC 5737): nothing outside the namespaces has one
ADDRESSES = ("192.0.2.1", "192.0.2.2")
PORT = 29511
STEPS = 60


class Hosts:
    """Two namespaces, each with one end of a cable."""

    def __init__(self) -> None:
        self.names = [f"d2v{os.getpid()}-{number}" for number in range(2)]
        self._run("link", "add", "cable", "netns", self._add(0), "type", "veth", "peer", "cable", "netns", self._add(1))
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self._run("-n", name, "link", "set", "lo", "up")
            self._run("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        self.cable("up")

    def cable(self, state: str) -> None:
        """Plug the cable in ("up") or cut it ("down")."""
        for name in self.names:
            self._run("-n", name, "link", "set", "cable", state)

    def give_connections_up(self) -> None:
        """Let the kernel end unanswered connections after some seconds instead of 15 minutes."""
        for name in self.names:
            self._run("netns", "exec", name, "sysctl", "-w", "net.ipv4.tcp_retries2=3")

    def start(self, number: int, words: list[str], output: Path) -> subprocess.Popen:
        """Run a command on a host with its output in a file."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
        environment["GLOO_SOCKET_IFNAME"] = "cable"
        with output.open("a") as file:
            words = ["ip", "netns", "exec", self.names[number], *words]
            return subprocess.Popen(words, stdout=file, stderr=file, env=environment)

    def close(self) -> None:
        """Remove both hosts and end their processes."""
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", name], check=False)

    def _add(self, number: int) -> str:
        self._run("netns", "add", self.names[number])
        return self.names[number]

    def _run(self, *words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    result = Hosts()
    yield result
    result.close()


@pytest.fixture(scope="module")
def on_one_host(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """Return the log of two processes on one host."""
    folder = tmp_path_factory.mktemp("one-host")
    torch.set_num_threads(1)
    file, output = tiny_file(folder, d2v__schedule__steps=STEPS), folder / "output"
    statuses = run_forked("--ds_config", file, "--run", "r", output=output, num_processes=2, before=leave_out_reports)
    assert statuses == [0, 0], output.read_text()
    return figures(folder, "r")


def launch(launcher: str, hosts: Hosts, folder: Path, *arguments: str, **changes: object) -> list[subprocess.Popen]:
    """Start the run `r` on both hosts."""
    file = tiny_file(folder, d2v__schedule__steps=STEPS, **changes)
    train = ["d2v_fast/train.py", "--ds_config", str(file), "--run-name", "r", *arguments]
    commands = []
    for number, address in enumerate(ADDRESSES):
        if launcher == "torchrun":
            meeting = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{ADDRESSES[0]}:{PORT}", "--rdzv_id", "d2v"]
            # both have the same name, by which the host would be guessed
            meeting += ["--rdzv_conf", f"is_host={number == 0}"]
            ranks = ["--nnodes", "2", "--nproc_per_node", "1", "--local_addr", address]
            commands.append([sys.executable, "-m", "torch.distributed.run", *meeting, *ranks, *train])
        else:
            hostfile = folder / "hostfile"
            hostfile.write_text("".join(f"{one} slots=1\n" for one in ADDRESSES))
            meeting = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)]
            meeting += ["--master_addr", ADDRESSES[0], "--master_port", str(PORT)]
            commands.append([sys.executable, "-m", "deepspeed.launcher.runner", *meeting, *train])
    return [hosts.start(number, words, folder / f"output-{number}") for number, words in enumerate(commands)]


def texts(folder: Path) -> list[str]:
    return [(folder / f"output-{number}").read_text() for number in range(2)]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_hosts_train_as_one(launcher: str, hosts: Hosts, tmp_path: Path, on_one_host: list[tuple]) -> None:
    started = launch(launcher, hosts, tmp_path)
    assert [host.wait(200) for host in started] == [0, 0], texts(tmp_path)
    assert figures(tmp_path, "r") == on_one_host


@pytest.mark.timeout(500)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_cut_cable_ends_every_process_in_time(
    launcher: str, hosts: Hosts, tmp_path: Path, on_one_host: list[tuple]
) -> None:
    # longer than two busy cores take to import DeepSpeed
    limit_s = 30
    started = launch(launcher, hosts, tmp_path, d2v__run__timeout_minutes=limit_s / 60)
    until(lambda: logged_steps(tmp_path, "r") > 7 or any(host.poll() is not None for host in started), timeout_s=200)
    hosts.cable("down")
    cut = time.monotonic()
    until(lambda: not any("RANK" in found for found in processes("d2v_fast/train.py", str(tmp_path)).values()), 200)
    took_s = time.monotonic() - cut
    # torchrun itself, unlike what it has started, waits for the kernel
    hosts.give_connections_up()
    statuses = [host.wait(150) for host in started]
    assert all(status != 0 for status in statuses), texts(tmp_path)
    first, second = texts(tmp_path)
    assert re.search(r"error: rank 0 got no further for 0.5 minutes: rank 1 \(pid \d+ on .*\) does not answer", first)
    assert re.search(r"error: rank 1 got no further for 0.5 minutes: rank 0 \(.*\) does not answer", second)
    assert took_s < 2 * limit_s
    hosts.cable("up")
    started = launch(launcher, hosts, tmp_path, "--resume")
    assert [host.wait(200) for host in started] == [0, 0], texts(tmp_path)
    assert "resumed after step" in texts(tmp_path)[0]
    assert figures(tmp_path, "r") == on_one_host
