"""The section `"d2v.run"`: the run folder, and how a run is carried out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from d2v_fast.config.deepspeed_sections import AutoBool
from d2v_fast.config.errors import MAX_SIZE, MAX_STEPS, PathText, Problem, Section, refuse_if


class RunSection(Section):
    """The run folder and how the run is carried out.

    Attributes:
        dir: Folder of all runs.
        name: Name of the run folder in `dir`; null takes the file's name and a number.
        seed: Seed of everything random.
        log_every: Optimizer steps between two logged ones.
        save_every: Optimizer steps between two checkpoints.
        keep: Checkpoints that are kept.
        background_save: Write checkpoints while training continues, for a second copy of the state in host memory.
        timeout_minutes: Longest wait for another process or for a batch; then the process ends with an error.
        profile: Measure the parts of a step. It waits for the device between them.
        device: "auto" takes a GPU if there is one.
        compile: Compile the blocks of student and teacher with `torch.compile`. "auto" does on a GPU. The first steps
            then take longer: 14 to 23 s for a Base model on an H200 (2026-11-26), longer on a CPU.
        cuda_graph: Replay a step from CUDA graphs, one for each shape of a micro-batch, so that the host does not hold
            up the device. "auto" does on a GPU with one process and neither ZeRO nor offload. A step that
            cannot be captured runs without a graph, and the run reports why.
        cuda_graph_shapes: Most shapes that have a graph; the one that was used the longest ago makes room.
        kept_samples: How stochastic depth chooses the samples that compute a branch: "drawn" for each sample alone,
            "fixed" for the same number in every micro-batch. "auto" is "fixed" in a captured step and "drawn" in every
            other. A captured step with "drawn" computes all samples and discards those that are skipped.
    """

    dir: PathText = "runs"
    name: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    log_every: int = Field(default=10, ge=1, le=MAX_STEPS)
    save_every: int = Field(default=1000, ge=1, le=MAX_STEPS)
    keep: int = Field(default=3, ge=1, le=10**6)
    background_save: bool = True
    timeout_minutes: float = Field(default=10.0, gt=0, le=525_600)
    profile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compile: AutoBool = "auto"
    cuda_graph: AutoBool = "auto"
    cuda_graph_shapes: int = Field(default=64, ge=1, le=MAX_SIZE)
    kept_samples: Literal["auto", "drawn", "fixed"] = "auto"

    @property
    def timeout_s(self) -> float:
        """`timeout_minutes` in seconds."""
        return 60 * self.timeout_minutes

    @model_validator(mode="after")
    def _check(self) -> Self:
        name, problems = self.name, []
        if name is not None and (not name.strip(".") or not all(c.isalnum() or c in "._-" for c in name)):
            problems.append(Problem("name", "be letters, digits, `.`, `_` and `-` only", name))
        refuse_if(problems)
        return self
