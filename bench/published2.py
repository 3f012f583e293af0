"""data2vec 2.0 as its publication describes it (arXiv 2212.07525), in plain PyTorch: the peer of a whole step.

It computes what the published code does, in its order, and keeps what that keeps: features and the bias of ALiBi are
repeated for each mask, attention is two products around a softmax in fp32, every copy is decoded at all places, the
teacher runs after the student and keeps all layers, which are normalized one by one at every place, a boolean mask
selects the targets at the end, the variance of predictions and targets is computed in every step, and the average is
updated tensor by tensor.

Parameters have the names of the published code's checkpoints, and the settings are those of its `cfg.model`.
Letters: B samples, M masks of a sample, T places, V visible ones, D width, H heads, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# every norm but those of blocks and context
EPS = 1e-5


class Output(NamedTuple):
    """The results of a step's forward pass.

    Attributes:
        losses: 0-d sums over rows, places and channels: `regression`, and `cls` where there is a class token.
        sample_size: 0-d, masked places of all rows.
        prediction: `[B * M, T, D]`.
        target: `[B, T, D]`.
        encoder_output: `[B * M, (1 +) V, D]`.
        deviations: of predictions and of targets, averaged over channels, 0-d each; the published code logs them.
    """

    losses: dict[str, Tensor]
    sample_size: Tensor
    prediction: Tensor
    target: Tensor
    encoder_output: Tensor
    deviations: tuple[Tensor, Tensor]

    def mean(self) -> Tensor:
        """Return the loss that is trained: the sum of all losses per masked place."""
        return sum(self.losses.values(), start=torch.zeros(())) / self.sample_size


class Network:
    """One network's forward pass on named tensors; a missing `local_encoder` is that of `shared`.

    Args:
        tensors: tensors by their published name.
        model: `cfg.model`.
        shared: the student, from which the teacher takes what is not averaged.
    """

    def __init__(self, tensors: Mapping[str, Tensor], model: dict[str, Any], shared: Network | None = None) -> None:
        self.tensors, self.model, self._shared = tensors, model, shared
        self.kind = model["supported_modality"]
        self.own = model["modalities"][self.kind.lower()]
        self._prefix = f"modality_encoders.{self.kind}."

    def _get(self, name: str) -> Tensor:
        return self.tensors[name]

    def _mine(self, name: str) -> Tensor:
        full = self._prefix + name
        if full not in self.tensors and self._shared is not None:
            return self._shared.tensors[full]
        return self.tensors[full]

    def _has(self, name: str) -> bool:
        return self._prefix + name in self.tensors

    # local features

    def local_features(self, inputs: Tensor) -> Tensor:
        """Return `[B, T, D]`: embedded patches, projected convolutions, or embedded tokens."""
        return {"IMAGE": self._patches, "AUDIO": self._frames, "TEXT": self._tokens}[self.kind](inputs)

    def _patches(self, pixels: Tensor) -> Tensor:
        weight, bias = self._mine("local_encoder.proj.weight"), self._mine("local_encoder.proj.bias")
        return F.conv2d(pixels, weight, bias, stride=self.own["patch_size"]).flatten(2).transpose(1, 2)

    def _frames(self, waveforms: Tensor) -> Tensor:
        x = waveforms[:, None]
        for i, (_, _, stride) in enumerate(feature_layers(self.own["feature_encoder_spec"])):
            x = F.conv1d(x, self._mine(f"local_encoder.conv_layers.{i}.0.weight"), stride=stride)
            x = self._norm(x.transpose(1, 2), f"local_encoder.conv_layers.{i}.2.1", EPS).transpose(1, 2)
            x = F.gelu(x)
        x = self._norm(x.transpose(1, 2), "project_features.1", EPS)
        return F.linear(x, self._mine("project_features.2.weight"), self._mine("project_features.2.bias"))

    def _tokens(self, ids: Tensor, padding: int = 1) -> Tensor:
        real = ids.ne(padding)
        positions = real.cumsum(1) * real + padding
        x = F.embedding(ids, self._mine("local_encoder.embed_tokens.weight"))
        x = x + F.embedding(positions, self._mine("local_encoder.embed_positions.weight"))
        return F.dropout(self._norm(x, "local_encoder.layernorm_embedding", EPS), self.own["dropout"], self.training)

    # encoder

    @property
    def training(self) -> bool:
        return self._shared is None

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self._mine(f"{name}.weight"), self._mine(f"{name}.bias"), eps)

    def _positions(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        kernel = max(3, self.own["conv_pos_width"] // self.own["conv_pos_depth"])
        for j in range(1, self.own["conv_pos_depth"] + 1):
            weight, bias = (self._mine(f"relative_positional_encoder.{j}.0.{part}") for part in ("weight", "bias"))
            x = F.conv1d(x, weight, bias, padding=kernel // 2, groups=self.own["conv_pos_groups"])
            x = F.gelu(F.layer_norm((x[..., :-1] if kernel % 2 == 0 else x).transpose(1, 2), x.shape[1:2], eps=EPS))
            x = x.transpose(1, 2)
        return x.transpose(1, 2)

    def encode(
        self, local: Tensor, masked: Tensor | None = None, keep: Tensor | None = None, keep_layers: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Return the last block's output, and every main block's tap and output if `keep_layers`.

        A tap is the output of the second linear map of a block's MLP.

        Args:
            local: `[B, T, D]`, local features, which are repeated for each mask.
            masked: bool `[B * M, T]`. None: nothing is hidden.
            keep: int64 `[B * M, V]`, the visible places.
            keep_layers: as the teacher does.
        """
        x, kind = local, self.kind
        if kind == "IMAGE":
            x = x + self._mine("fixed_positional_encoder.positions").to(x.dtype)
        if masked is None or keep is None:
            if kind == "AUDIO":
                x = x + self._positions(x)
            bias = self._alibi(x) if self.own["use_alibi_encoder"] else None
        else:
            x, bias = self._visible(x, masked, keep)
        if kind == "IMAGE":
            x = torch.cat([self._mine("extra_tokens").expand(len(x), -1, -1), x], 1)
        if self._has("context_encoder.norm.weight"):
            x = self._norm(x, "context_encoder.norm", self.model["norm_eps"])
            x = F.dropout(x, self.own["prenet_dropout"], self.training)
        for i in range(self.own["prenet_depth"]):
            x, _ = self._block(x, f"{self._prefix}context_encoder.blocks.{i}.", bias)
        layers = []
        for i in range(self.model["depth"]):
            x, tap = self._block(x, self.block_prefix(i), bias)
            if keep_layers:
                layers.append((tap, x))
        return x, layers

    def _visible(self, x: Tensor, masked: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return `[B * M, V, D]` of `[B, T, D]`, and the bias of their attention logits, `[B * M, H, V, V]`."""
        M, T = len(masked) // len(x), masked.shape[1]
        samples, x = x, x.repeat_interleave(M, 0)
        index = keep[..., None].expand(-1, -1, x.shape[-1])
        visible = x.gather(1, index)
        if self.kind == "AUDIO":
            x = x * (1 - masked.to(x.dtype)[..., None])
            visible = visible + self._positions(x).gather(1, index)
        if not self.own["use_alibi_encoder"]:
            return visible, None
        bias = self._alibi(samples).expand(len(samples), -1, -1, -1).repeat_interleave(M, 0)
        H, rows = bias.shape[1], keep[:, None, :, None]
        bias = bias.gather(2, rows.expand(-1, H, -1, T))
        return visible, bias.gather(3, rows.transpose(2, 3).expand(-1, H, keep.shape[1], -1))

    def block_prefix(self, i: int) -> str:
        """Return the name of a main block; where only the blocks are averaged, the average leaves `blocks` out."""
        prefix = f"blocks.{i}."
        return prefix if f"{prefix}norm1.weight" in self.tensors else f"{i}."

    def _alibi(self, x: Tensor) -> Tensor:
        bias = alibi_table(self.own["num_alibi_heads"], x.shape[1], x.device)
        return bias * self._mine("alibi_scale")[0].clamp_min(0).to(bias.dtype) if self._has("alibi_scale") else bias

    def _block(self, x: Tensor, name: str, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        get, model = self._get, self.model
        (B, T, D), H = x.shape, model["num_heads"]
        drop = self.training
        qkv = F.linear(x, get(f"{name}attn.qkv.weight"), get(f"{name}attn.qkv.bias"))
        q, k, v = qkv.view(B, T, 3, H, D // H).permute(2, 0, 3, 1, 4)
        logits = (q * (D // H) ** -0.5) @ k.transpose(-2, -1)
        if bias is not None:
            logits = logits.to(torch.promote_types(logits.dtype, bias.dtype))
            # in place on a part, as published
            logits[:, : bias.shape[1]] += bias
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = F.dropout(logits.softmax(-1, dtype=wide).to(q.dtype), model["attention_dropout"], drop)
        attended = (weights @ v).transpose(1, 2).reshape(B, T, D)
        attended = F.linear(attended, get(f"{name}attn.proj.weight"), get(f"{name}attn.proj.bias"))
        x = x + F.dropout(attended, model["encoder_dropout"], drop)
        x = F.layer_norm(x, (D,), get(f"{name}norm1.weight"), get(f"{name}norm1.bias"), model["norm_eps"])
        hidden = F.gelu(F.linear(x, get(f"{name}mlp.fc1.weight"), get(f"{name}mlp.fc1.bias")))
        hidden = F.dropout(hidden, model["activation_dropout"], drop)
        tap = F.linear(hidden, get(f"{name}mlp.fc2.weight"), get(f"{name}mlp.fc2.bias"))
        x = x + F.dropout(tap, model["post_mlp_drop"], drop)
        return F.layer_norm(x, (D,), get(f"{name}norm2.weight"), get(f"{name}norm2.bias"), model["norm_eps"]), tap

    def decode(self, encoded: Tensor, masked: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return predictions at all places, `[B * M, T, D]`.

        Args:
            encoded: `[B * M, (1 +) V, D]`.
            masked: bool `[B * M, T]`.
            noise: `[B * M, T - V, D]`, what stands at the masked places. None draws it.
        """
        settings, skipped = self.own["decoder"], self.own["num_extra_tokens"]
        encoded = F.dropout(encoded, settings["input_dropout"], self.training)[:, skipped:]
        R, V, D = encoded.shape
        if noise is None:
            noise = encoded.new_empty(R, masked.shape[1] - V, D).normal_(0, self.own["mask_noise_std"])
        order = shuffled(masked).argsort(1)
        x = torch.cat([encoded, noise], 1).gather(1, order[..., None].expand(-1, -1, D))
        x, T, padding = x.transpose(1, 2), x.shape[1], settings["decoder_kernel"] // 2
        two = self.kind == "IMAGE"
        if two:
            x = x.unflatten(2, (math.isqrt(T), -1))
        conv = F.conv2d if two else F.conv1d
        for j in range(settings["decoder_layers"]):
            weight, bias = (self._mine(f"decoder.blocks.{j}.0.{part}") for part in ("weight", "bias"))
            y = conv(x, weight, bias, padding=padding, groups=settings["decoder_groups"])
            if settings["decoder_kernel"] % 2 == 0:
                y = y[..., :-1, :-1] if two else y[..., :-1]
            y = F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2], eps=EPS).movedim(-1, 1))
            x = x + y if settings["decoder_residual"] and x.shape == y.shape else y
        x = x.flatten(2).transpose(1, 2)
        if self._has("decoder.proj.weight"):
            return F.linear(x, self._mine("decoder.proj.weight"), self._mine("decoder.proj.bias"))
        layers = sorted(
            {int(name.split(".")[-2]) for name in self.tensors if name.startswith(f"{self._prefix}decoder.proj.")}
        )
        for number, layer in enumerate(layers):
            x = F.gelu(x) if number else x
            x = F.linear(x, self._mine(f"decoder.proj.{layer}.weight"), self._mine(f"decoder.proj.{layer}.bias"))
        return x


def forward(student: Network, teacher: Network, inputs: Tensor, masked: Tensor, noise: Tensor | None = None) -> Output:
    """Run student and teacher on a batch.

    Args:
        student, teacher: the networks.
        inputs: `[B, ...]`.
        masked: bool `[B * M, T]`; row `b * M + m` is mask m of sample b; equally many places are masked in all rows.
        noise: `[B * M, T, D]`, of which the decoder reads the masked places. None draws it.
    """
    model = student.model
    M, V = model["clone_batch"], int((~masked[0]).sum())
    local = student.local_features(inputs)
    encoded, _ = student.encode(local, masked, shuffled(masked)[:, :V])
    hidden = None if noise is None else noise[masked].view(len(masked), -1, noise.shape[-1])
    prediction = student.decode(encoded, masked, hidden)
    with torch.no_grad():
        shares = not any(name.startswith(f"modality_encoders.{student.kind}.local_encoder") for name in teacher.tensors)
        _, layers = teacher.encode(local if shares else teacher.local_features(inputs), keep_layers=True)
        target = make_target([tap[:, tap.shape[1] - masked.shape[1] :] for tap, _ in layers], model)
        wanted = target.repeat_interleave(M, 0)[masked]
    size, predicted = masked.sum(), prediction[masked]
    losses = {"regression": regression(predicted, wanted, model).sum()}
    if model["cls_loss"]:
        term = regression(encoded[:, 0], target.mean(1).repeat_interleave(M, 0), model).sum()
        losses["cls"] = term * (model["cls_loss"] * size)
    return Output(losses, size, prediction, target, encoded, (deviation(predicted), deviation(wanted)))


def shuffled(masked: Tensor) -> Tensor:
    """Return the visible places of each row, ascending, then the masked ones, int64 `[B * M, T]`."""
    return masked.byte().argsort(dim=1, stable=True)


@torch.no_grad()
def deviation(rows: Tensor) -> Tensor:
    """Return the standard deviation over rows `[N, D]`, averaged over channels, 0-d."""
    return (rows.float().var(0) + 1e-6).sqrt().mean()


def regression(prediction: Tensor, target: Tensor, model: dict[str, Any]) -> Tensor:
    """Return the loss of every channel, scaled."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.to(wide), target.to(wide)
    scale = 1 / math.sqrt(prediction.shape[-1]) if model["loss_scale"] is None else model["loss_scale"]
    if model["loss_beta"] == 0:
        return F.mse_loss(prediction, target, reduction="none") * scale
    return F.smooth_l1_loss(prediction, target, beta=model["loss_beta"], reduction="none") * scale


def make_target(taps: list[Tensor], model: dict[str, Any]) -> Tensor:
    """Return the normalized average of the last K taps, `[B, T, D]`."""
    layers = [tap.to(torch.promote_types(tap.dtype, torch.float32)) for tap in taps[-model["average_top_k_layers"] :]]
    if model["instance_norm_target_layer"]:
        layers = [F.instance_norm(layer.transpose(1, 2), eps=EPS).transpose(1, 2) for layer in layers]
    if model["layer_norm_target_layer"]:
        layers = [F.layer_norm(layer, layer.shape[-1:], eps=EPS) for layer in layers]
    average = layers[0]
    for layer in layers[1:]:
        average = average.add_(layer)
    average = average.div_(len(layers))
    if model["layer_norm_targets"]:
        average = F.layer_norm(average, average.shape[-1:], eps=EPS)
    if model["instance_norm_targets"]:
        average = F.instance_norm(average.transpose(1, 2), eps=EPS).transpose(1, 2)
    return average


@torch.no_grad()
def average(teacher: Network, student: Network, decay: float) -> None:
    """Update the teacher's tensors in place, one after the other. The fixed table of positions is copied."""
    for name, averaged in teacher.tensors.items():
        live = student.tensors[name if name in student.tensors else f"blocks.{name}"]
        if name.endswith("fixed_positional_encoder.positions"):
            averaged.copy_(live)
        else:
            averaged.mul_(decay).add_(live.to(averaged.dtype), alpha=1 - decay)


@lru_cache
def alibi_table(num_heads: int, num_places: int, device: torch.device) -> Tensor:
    """Return the bias of ALiBi, fp32 `[1, H, T, T]`, made once and kept as in the published code."""
    places = torch.arange(num_places, device=device)
    distances = -(places[:, None] - places).abs().float()
    slopes = torch.tensor(alibi_slopes(num_heads), dtype=torch.float32, device=device)
    return (slopes[:, None, None] * distances)[None]


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head (Press et al., arXiv 2108.12409), also where their number is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / power * i) for i in range(1, power + 1)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def feature_layers(spec: str) -> list[tuple[int, int, int]]:
    """Return (channels, kernel, stride) of each convolution of a specification such as `[(512, 3, 2)] * 4 + ...`."""
    layers: list[tuple[int, int, int]] = []
    for term in spec.split("+"):
        numbers = [int(number) for number in "".join(c if c.isdigit() else " " for c in term).split()]
        channels, kernel, stride, *times = numbers
        layers += [(channels, kernel, stride)] * (times[0] if times else 1)
    return layers


def useful_flop(model: dict[str, Any], num_samples: int, num_places: int, num_visible: int) -> dict[str, float]:
    """Return the operations of the matrix products that loss and gradients need, by part of a step.

    A backward pass is two products for each one of the forward pass, less those for the input data. What nobody reads
    is left out: the decoder's last map where no place is masked.

    Args:
        model: `cfg.model`.
        num_samples: B.
        num_places, num_visible: T and V of a sample, without class token.
    """
    kind, M, D = model["supported_modality"], model["clone_batch"], model["embed_dim"]
    own, T, V = model["modalities"][kind.lower()], num_places, num_visible
    prefix, blocks = own["num_extra_tokens"], model["depth"] + own["prenet_depth"]

    def encoder(tokens: int) -> float:
        return blocks * (8 * tokens * D**2 + 4 * tokens**2 * D + 4 * tokens * D * int(D * model["mlp_ratio"]))

    local, first, positions = 0.0, 0.0, 0.0
    if kind == "IMAGE":
        local = first = 2 * T * own["in_chans"] * own["patch_size"] ** 2 * D
    if kind == "AUDIO":
        layers = feature_layers(own["feature_encoder_spec"])
        lengths = [T]
        for _, kernel, stride in reversed(layers[1:]):
            lengths.insert(0, (lengths[0] - 1) * stride + kernel)
        C = 1
        for length, (width, kernel, _) in zip(lengths, layers, strict=True):
            local += 2 * length * kernel * C * width
            first, C = first or local, width
        local += 2 * T * C * D
        kernel = max(3, own["conv_pos_width"] // own["conv_pos_depth"])
        positions = own["conv_pos_depth"] * 2 * T * kernel * D * (D // own["conv_pos_groups"])
    settings = own["decoder"]
    C, taps = settings["decoder_dim"], settings["decoder_kernel"] ** (2 if kind == "IMAGE" else 1)
    widths = [D] + [C] * settings["decoder_layers"]
    decoder = sum(2 * T * taps * a * b / settings["decoder_groups"] for a, b in pairwise(widths))
    hidden = int(C * settings["projection_ratio"])
    last = 2 * (T - V) * (C * D if settings["projection_layers"] == 1 else C * hidden + hidden * D)
    # the averaged patch embedding runs once more
    own_local = local if own["ema_local_encoder"] else 0.0
    return {
        "local features": num_samples * (3 * local - first),
        "teacher": num_samples * (own_local + positions + encoder(T + prefix)),
        "student": num_samples * M * 3 * (positions + encoder(V + prefix)),
        "decoder": num_samples * M * 3 * (decoder + last),
    }
