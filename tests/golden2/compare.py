"""How far a computed step is from a recorded one, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tests.golden2.cases import Case

# fp32, max abs(a - b) / max abs(b) per tensor; quantities that the table of README.md lacks have a neighbor's
_FP32 = {
    "IMAGE": {"prediction": 2e-6, "target": 4e-6, "gradients": 5e-6},
    "AUDIO": {"prediction": 5e-6, "target": 1e-5, "gradients": 5e-5},
    "TEXT": {"prediction": 2e-6, "target": 3e-6, "gradients": 5e-6},
}
_QKV = "attn.qkv.bias"
_AS = {
    "key biases": "gradients",
    "encoder output": "prediction",
    "context input": "prediction",
    "local features": "prediction",
}
_ALL = 1e-6
# in fp64, of gradients that are 0 in exact arithmetic
_ZERO = 1e-8


class Row(NamedTuple):
    """One line of the report: the worst relative error of a quantity, and the tensor that has it."""

    quantity: str
    error: float
    limit: float
    worst: str

    @property
    def fits(self) -> bool:
        """Whether the error is within its limit; NaN is not."""
        return self.error <= self.limit


@dataclass
class Step:
    """One computed step, by the names of the reference and in its order; a quantity that was not computed is None.

    Attributes:
        losses: "MODE_regression", "cls", "total" and "mean".
        prediction: `[N, D]`, at the masked places, row by row.
        target: `[B, T, D]`.
        encoder_output: `[B * M, (1 +) V, D]`, the visible places in the order of `ids_keep`.
        context_input: The same before the first of the main blocks.
        local_features: `[B, T, D]`.
        gradients: By parameter.
        average: The teacher after its update, by name.
        deviations: "target_var" and "pred_var".
    """

    losses: Mapping[str, Tensor]
    prediction: Tensor
    target: Tensor
    encoder_output: Tensor
    gradients: Mapping[str, Tensor]
    context_input: Tensor | None = None
    local_features: Tensor | None = None
    average: Mapping[str, Tensor] | None = None
    deviations: Mapping[str, Tensor] | None = None


def limit_of(case: Case, quantity: str, dtype: torch.dtype) -> float:
    """Return the largest relative error that a quantity may have."""
    if dtype == torch.float64:
        return _ZERO if quantity == "key biases" else _ALL
    return _FP32[case.kind].get(_AS.get(quantity, quantity), _ALL)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return `max abs(found - expected) / max abs(expected)`; infinite for another shape."""
    if found.shape != expected.shape:
        return math.inf
    error, largest = (found.double() - expected.double()).abs().max().item(), expected.double().abs().max().item()
    if largest == 0.0:
        # only a gradient of zero has no scale; its error counts by itself
        return 0.0 if error <= _ZERO else math.inf
    return error / largest


def compare(case: Case, step: Step, dtype: torch.dtype) -> list[Row]:
    """Compare a step with what the case recorded in this dtype; one row for each quantity that the case has."""
    prefix = "expected_fp64." if dtype == torch.float64 else "expected."
    expected = case.below(prefix)
    is_masked = case.tensors["mask"].bool()
    prediction = {} if "prediction" not in expected else {"": expected["prediction"][is_masked]}
    groups: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = {
        "losses": (step.losses, case.below(f"{prefix}loss.")),
        "prediction": ({"": step.prediction}, prediction),
        "encoder output": ({"": step.encoder_output}, _named(expected, "encoder_output")),
        "target": ({"": step.target}, _named(expected, "target")),
        "gradients": (_without_keys(step.gradients), _without_keys(case.below(f"{prefix}grad."))),
        "key biases": (_qkv(step.gradients), _qkv(case.below(f"{prefix}grad."))),
    }
    if step.context_input is not None:
        groups["context input"] = ({"": step.context_input}, _named(expected, "context_input"))
    if step.local_features is not None:
        groups["local features"] = ({"": step.local_features}, _named(expected, "local_features"))
    if step.average is not None:
        groups["average"] = (step.average, case.below(f"{prefix}teacher_after."))
    if step.deviations is not None:
        groups["deviations"] = (step.deviations, case.below(f"{prefix}log."))
    rows = []
    for quantity, (found, wanted) in groups.items():
        if not wanted:
            continue
        error_of = _key_error if quantity == "key biases" else relative_error
        errors = {name: error_of(found[name], one) if name in found else math.inf for name, one in wanted.items()}
        # a tensor that the reference does not have is as wrong as one that is missing
        errors |= {name: math.inf for name in found.keys() - wanted.keys() if quantity in ("gradients", "average")}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        rows.append(Row(quantity, errors[worst], limit_of(case, quantity, dtype), worst))
    return rows


def _named(expected: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {"": expected[name]} if name in expected else {}


def _without_keys(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the keys' part of `attn.qkv.bias`, whose gradient is 0 in exact arithmetic."""
    return {
        name: torch.cat([one.chunk(3)[0], one.chunk(3)[2]]) if name.endswith(_QKV) else one
        for name, one in gradients.items()
    }


def _qkv(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in gradients.items() if name.endswith(_QKV)}


def _key_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error in the keys' part, relative to the largest gradient of the whole bias."""
    if found.shape != expected.shape:
        return math.inf
    error = (found.double() - expected.double()).chunk(3)[1].abs().max().item()
    return error / expected.double().abs().max().item()
