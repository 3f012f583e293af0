"""A whole pre-training step, compared with the same step around Transformers' model. It has none of data2vec 2.0, whose
step is compared with the published way in plain torch.

On a GPU our step is what a run has there: compiled blocks and CUDA graphs. Both start from the same weights and must
agree on loss and gradients before they are timed. They alternate, so that
other load slows both. Data is created before. In addition to the figures of every benchmark, `extra_info` contains the
share of each part in percent; images, or seconds of sound, per second; `gflop_per_s`, the arithmetic that the objective
needs (`useful_flop`) per second; and `gemm_gflop_per_s`, the rate of a large matrix product in the same process and
precision, measured before every pair.

`base` has the published sizes, `base published` also the published rates of dropout and stochastic depth: the peer
computes residual branches and multiplies them by zero, ours skips them. `speech` is the published Base model without
dropout; `speech lean` recomputes norms and GELUs of the convolutions in the backward pass. `... 2.0` are the published
Base models of data2vec 2.0 without dropout, on samples of the published length: 20 s of speech, 512 tokens. So that a
step ends within seconds on two cores, speech has 2 of 12 blocks, and text 4. Their arithmetic is listed by part.
`trial`, of 2 blocks, only tries the benchmark, as `make gpu DEVICE=cpu` does.
"""

from __future__ import annotations

import statistics
import time
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import peers_data2vec2
from bench.measure import compared, describe_device, peak_bytes, quantiles
from d2v_fast.config import D2VConfig, RunConfig, load_config
from d2v_fast.data import Batch, Step
from d2v_fast.distributed.world import World
from d2v_fast.objectives.build import build_model
from d2v_fast.teacher import Teacher
from d2v_fast.training.capture import WARM_UP_RUNS, Capture, CudaCapture
from d2v_fast.training.captured_step import CapturedStep, CaptureOptions
from d2v_fast.training.compiled_blocks import compile_blocks
from d2v_fast.training.engine import PlainEngine, make_engine
from d2v_fast.training.step import TrainStep
from d2v_fast.training.stepclock import CAPTURED_PARTS, PARTS, StepClock

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = ["d2v.model.width=384", "d2v.model.heads=6"]
WITHOUT_DROPOUT = ["d2v.model.drop_path=0.0", "d2v.model.attention_dropout=0.0"]
SPEECH = [f"d2v.model.{rate}=0.0" for rate in ("dropout", "attention_dropout", "layer_drop")]
TEXT = ["d2v.model.dropout=0.0", "d2v.model.attention_dropout=0.0", "d2v.data.tokenizer=/none"]
RATES = ("dropout", "attention_dropout", "context_dropout", "layer_drop", "decoder.dropout")
NO_RATES = [f"d2v.model.{rate}=0.0" for rate in RATES]
BLOCKS = ("model.depth", "target.top_k")
IMAGES2 = [*NO_RATES, "d2v.loss.cls_scale=per_batch", "d2v.loss.cls_weight=0.01"]
SPEECH2 = [*NO_RATES, f"d2v.data.max_seconds={peers_data2vec2.SECONDS}", *(f"d2v.{key}=2" for key in BLOCKS)]
TEXT2 = [*NO_RATES, "d2v.data.tokenizer=/none", f"d2v.data.block_size={peers_data2vec2.TOKENS}"]
TEXT2 += [f"d2v.{key}=4" for key in BLOCKS]
# with the step whose memory is measured, those that the clock ignores
NUM_WARMUP, NUM_ROUNDS = 2, 5
LR = 1e-4
# cases that `make bench` runs, and `pytest bench/` leaves out
LONG = ("base published", "speech lean", "images 2.0", "speech 2.0", "text 2.0", "trial")


class Case(NamedTuple):
    """A configuration file, samples per batch on a CPU and on a GPU, and overrides."""

    file: str
    batch_size: int
    batch_size_on_gpu: int
    changes: list[str]


CASES = {
    "small": Case("vision_base", 8, 128, [*SMALL, *WITHOUT_DROPOUT]),
    "base": Case("vision_base", 4, 128, WITHOUT_DROPOUT),
    "base published": Case("vision_base", 4, 128, []),
    "speech": Case("speech_base", 2, 48, SPEECH),
    "text": Case("text_base", 2, 32, TEXT),
    "speech lean": Case("speech_base", 2, 48, [*SPEECH, "d2v.model.front_end_checkpointing=true"]),
    "images 2.0": Case("vision2_base", 1, 16, IMAGES2),
    "speech 2.0": Case("speech2_base", 1, 12, SPEECH2),
    "text 2.0": Case("text2_base", 1, 16, TEXT2),
    "trial": Case("vision_base", 1, 32, [*SMALL, *WITHOUT_DROPOUT, *(f"d2v.{key}=2" for key in BLOCKS)]),
}


def peers_of(config: D2VConfig) -> Any:
    """Return the module of a configuration's peer, which also knows its inputs and its arithmetic."""
    is_first = config.objective == "data2vec"
    return import_module(f"bench.peers_{config.modality}") if is_first else peers_data2vec2


class OurStep:
    """The step of the training loop. With a capture it is captured and its blocks are compiled, as on a GPU."""

    def __init__(self, config: RunConfig, device: torch.device, capture: Capture | None = None) -> None:
        self._world = World(device.type)
        self.model = build_model(config.pretraining).to(device)
        self.engine = make_engine(self.model, config.deepspeed, self._world, decay_1d=config.d2v.decay_1d)
        self.teacher = Teacher(
            self.model.student.averaged, config.pretraining.teacher, compute_dtype=self.engine.compute_dtype
        )
        self._capture, self._max_shapes = capture, config.d2v.run.cuda_graph_shapes
        self.clock = StepClock(device, enabled=True, parts=PARTS if capture is None else CAPTURED_PARTS)
        self._divisor, self._number = config.pretraining.loss.divisor(config.d2v.model.width), 0
        self._step: TrainStep | None = None

    def _make(self) -> TrainStep:
        common: dict[str, Any] = {"divisor": self._divisor, "seed": 0, "clock": self.clock}
        if self._capture is None:
            self.model.part = self.clock.part
            return TrainStep(self.engine, self.teacher, self._world, **common)
        assert isinstance(self.engine, PlainEngine)
        compile_blocks(self.model, self.teacher.module)
        options = CaptureOptions(self._capture, self._max_shapes, fixed_counts=True, say=print)
        return CapturedStep(self.engine, self.teacher, self._world, options, **common)

    def loss(self, batch: Batch) -> Tensor:
        """As it is trained: the mean over masked places."""
        output = self.engine.forward(batch, self.teacher.module)
        return output.loss_sum / (output.num_rows * self._divisor)

    def __call__(self, batch: Batch) -> None:
        """A whole step that is not logged."""
        self._number += 1
        # made only now: a captured step keeps the places of the gradients, which a comparison before frees
        self._step = self._step or self._make()
        self._step(self._number, Step([batch], len(batch.rows)), LR, moments=False)
        self.clock.end_step()

    def shares(self) -> dict[str, float]:
        """Percent of the step by part. The peer runs between two steps: what no part has counted is left out."""
        milliseconds = self.clock.report()["ms_per_step"]
        parts = {part: ms for part, ms in milliseconds.items() if part not in ("data", "everything else")}
        return {part: round(100 * ms / sum(parts.values()), 2) for part, ms in parts.items()}


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.slow if case in LONG else ()) for case in CASES])
@pytest.mark.timeout(600)
def bench_step(benchmark: Any, device: torch.device, tmp_path: Path, case: str, request: pytest.FixtureRequest) -> None:
    if case == "trial" and not request.config.getoption("--figures"):
        pytest.skip("only a trial of `make gpu`")
    torch.manual_seed(0)
    file, on_cpu, on_gpu, changes = CASES[case]
    batch_size = on_gpu if device.type == "cuda" else on_cpu
    changes = [*changes, f"train_batch_size={batch_size}", f"train_micro_batch_size_per_gpu={batch_size}"]
    config = load_config(CONFIGS / f"{file}.json", [*changes, f"d2v.data.path={tmp_path}"])
    capture = CudaCapture(device) if device.type == "cuda" else None
    ours = OurStep(config, device, capture)
    peer = peers_of(config.d2v).PeerStep(ours.model, config, tmp_path, device, LR)
    batch, masked = random_batch(config.d2v, batch_size, device)
    if isinstance(peer, peers_data2vec2.PeerStep):
        peers_data2vec2.assert_same_step(ours, peer, batch, masked)
    elif case != "base published":
        assert_same_step(config.d2v, ours, peer, batch, masked)

    for _ in range(NUM_WARMUP if capture is None else WARM_UP_RUNS + NUM_WARMUP):
        ours(batch)
    peer(batch, masked)
    peak = peak_bytes(lambda: ours(batch), device)
    peer_peak = peak_bytes(lambda: peer(batch, masked), device)
    gemm_rates, peer_seconds = [], []

    def run_peer() -> None:
        gemm_rates.append(gemm_gflop_per_s(ours.engine.compute_dtype, device))
        started = now(device)
        peer(batch, masked)
        peer_seconds.append(now(device) - started)

    def run_ours() -> None:
        ours(batch)
        now(device)

    benchmark.group = "step"
    benchmark.pedantic(run_ours, setup=run_peer, rounds=NUM_ROUNDS)
    if benchmark.stats is None:
        return
    seconds = benchmark.stats.stats.data
    by_part = useful_gflop(config.d2v, peer, batch, masked)
    gflop = sum(by_part.values())
    gemm, shares = statistics.median(gemm_rates), ours.shares()
    info = benchmark.extra_info
    info |= {"op": "step", "case": f"{case}, batch {batch_size}", **describe_device(device), **quantiles(seconds)}
    info |= {"peak_bytes": peak, "shares": shares, "gflop": by_part, "dtype": str(ours.engine.compute_dtype)}
    what, per_sample = peers_of(config.d2v).amount(config.d2v)
    amount = batch_size * per_sample
    info |= {"units_per_s": amount / info["p50_s"], "gflop_per_s": gflop / info["p50_s"], "gemm_gflop_per_s": gemm}
    info["percent_of_gemm"] = 100 * info["gflop_per_s"] / gemm
    if capture is None:
        info["share_of_operations"] = shares["EMA"] + shares["target + loss"]
    row = compared(peer_seconds, seconds) | {"peak_bytes": peer_peak}
    info["peers"] = {f"{peer.name} ({peer.attention})": row}
    info["note"] = (
        f"{info['case']}: {info['units_per_s']:.2f} {what} per s, "
        f"{info['gflop_per_s']:.0f} GFLOP/s of useful arithmetic, "
        f"{info['percent_of_gemm']:.0f} % of a large matrix product's {gemm:.0f}; "
        + ", ".join(f"{part} {share:.1f} %" for part, share in shares.items())
        + "; arithmetic in GFLOP: "
        + ", ".join(f"{part} {amount:.0f}" for part, amount in by_part.items())
        + "."
    )


def random_batch(config: D2VConfig, batch_size: int, device: torch.device) -> tuple[Batch, Tensor]:
    """Create noise with published masks, and the masks as bool `[B, P]`, of data2vec 2.0 `[B * M, P]`."""
    if config.objective != "data2vec":
        batch, masked = peers_data2vec2.random_batch(config, batch_size)
        return batch.to(device), masked.to(device)
    batch = peers_of(config).random_batch(config, batch_size)
    masked = torch.zeros(batch_size * config.model.num_places(batch.inputs.shape), dtype=torch.bool)
    masked.index_fill_(0, batch.rows, True)
    return batch.to(device), masked.view(batch_size, -1).to(device)


def assert_same_step(config: D2VConfig, ours: OurStep, peer: Any, batch: Batch, masked: Tensor) -> None:
    """Check that the loss and all gradients of encoder and head agree."""
    tolerance = 1e-3 if ours.engine.compute_dtype == torch.float32 else 0.1
    loss, peer_loss = ours.loss(batch), peer.loss(batch, masked)
    torch.testing.assert_close(loss, peer_loss, rtol=tolerance / 10, atol=0)
    loss.backward()
    peer_loss.backward()
    mine, theirs = gradients(ours.model.student), gradients(peer.student.encoder)
    layout = peers_of(config).layout(config.model)
    heads = gradients(peer.student.head)
    pairs = {f"head.{name}": (gradient, heads[name]) for name, gradient in gradients(ours.model.head).items()}
    for own, gradient in mine.items():
        # whole, as ours: the bias of the keys alone has a gradient of zero, and rounding
        parts = {
            name: (part.cpu().flatten(), theirs[name].cpu().flatten())
            for name, part in layout.theirs(own, gradient).items()
        }
        own_parts, their_parts = zip(*parts.values(), strict=True)
        pairs[own] = torch.cat(own_parts), torch.cat(their_parts)
    for name, (actual, expected) in pairs.items():
        error = (actual - expected).norm() / expected.norm()
        assert error < tolerance, f"{name}: relative error of the gradient {error:.1e}"
    ours.model.zero_grad()
    peer.student.zero_grad()


def useful_gflop(config: D2VConfig, peer: Any, batch: Batch, masked: Tensor) -> dict[str, float]:
    """Return the arithmetic that loss and gradients of a batch need; of data2vec 2.0 by part."""
    if isinstance(peer, peers_data2vec2.PeerStep):
        return {part: flop / 1e9 for part, flop in peer.useful_flop(batch, masked).items()}
    return {"step": peers_of(config).useful_flop(config, len(batch.inputs), len(batch.rows)) / 1e9}


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def gemm_gflop_per_s(dtype: torch.dtype, device: torch.device) -> float:
    """Return the best measured rate of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(3):
        started = now(device)
        torch.mm(a, b)
        seconds.append(now(device) - started)
    return 2 * size**3 / min(seconds) / 1e9


def now(device: torch.device) -> float:
    """Return the time in seconds after the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
