"""Runs of one checkpoint, written without training."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from d2v_fast.checkpoints.shard_files import Kept, copy_to_host, write_shards
from d2v_fast.config import (
    BlockMaskConfig,
    D2VConfig,
    RunSection,
    TargetConfig,
    VisionConfig,
    VisionDataConfig,
    VisionModelConfig,
)
from d2v_fast.distributed.shards import Shard
from d2v_fast.modalities.speech.fairseq import FairseqSpeech
from d2v_fast.modalities.text.fairseq import FairseqText
from d2v_fast.objectives.build import build_model
from d2v_fast.objectives.data2vec import Data2Vec


def vision_config(*, width: int, depth: int) -> VisionConfig:
    """A vision encoder for images of 8 x 8 pixels."""
    return VisionConfig(
        model=VisionModelConfig(image_size=8, patch_size=2, channels=1, width=width, depth=depth, heads=2),
        mask=BlockMaskConfig(num_patches=9, min_patches=2),
        target=TargetConfig(top_k=2),
        data=VisionDataConfig(mean=(0.3,), std=(0.4,)),
        run=RunSection(seed=5),
    )


CONFIG = vision_config(width=16, depth=2)


def write_run(folder: Path, config: D2VConfig, processes: int) -> Data2Vec:
    """Write a run with one checkpoint, as this many processes would; its average is twice the returned model."""
    import hashlib

    torch.manual_seed(1)
    model = build_model(config)
    checkpoint = folder / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train_batch_size": 64, "d2v": config.model_dump(mode="json")}))
    kinds = {"student": dict(model.named_parameters())}
    kinds["teacher"] = {name: 2 * p.detach() for name, p in model.student.averaged.named_parameters()}
    shapes = {f"{kind}/{name}": list(value.shape) for kind, state in kinds.items() for name, value in state.items()}
    for rank in range(processes):
        kept = []
        for kind, state in kinds.items():
            for name, value in state.items():
                flat = value.detach().reshape(-1)
                size = -(-flat.numel() // processes)
                part = flat[rank * size : (rank + 1) * size]
                if part.numel():
                    kept.append(Kept(kind, Shard(name, value.shape, rank * size, part, flat, rank * size, False)))
        write_shards(checkpoint / f"shard-{rank:05d}.safetensors", copy_to_host(kept, even_if_there=False))
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "shapes": shapes}))
    files = {}
    for path in checkpoint.iterdir():
        content = path.read_bytes()
        files[path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 7, "files": files}))
    return model


def assert_holds_run(found: FairseqSpeech | FairseqText, model: Data2Vec) -> None:
    """Assert that a fairseq checkpoint holds the student, head and teacher of a run that `write_run` wrote."""
    assert found.teacher is not None
    assert found.head is not None
    for name, p in model.student.named_parameters():
        assert torch.equal(found.student.state_dict()[name], p), name
        factor = 2 if name.startswith("context.") else 1
        assert torch.equal(found.teacher.state_dict()[name], factor * p), name
    for name, p in model.head.named_parameters():
        assert torch.equal(found.head[name], p), name
