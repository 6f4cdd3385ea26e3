"""The demo's denoiser: diffusers' WanTransformer3DModel, small, and its flow matching training."""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from demo import workers
from demo.autoencoder import CHANNELS
from demo.muon import Muon
from demo.text import PIPELINE_LENGTH, WIDTH, embed
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel

ATTENTION_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MUON_RATE, ADAM_RATE = 0.02, 1e-3
PROMPT_DROPOUT = 0.1
OTHER_LENGTHS = (64, 128, 226, 256)  # what people may pass as max_sequence_length


@dataclass
class Clips:
    """Training clips of one size, all on one device.

    latents: bfloat16 [n, channels, frames, height, width], normalised; ids: int64 [n, variants, tokens], the same scene
    said in several ways; batch: clips a step; shift: how far noise levels are shifted towards pure noise.
    """

    latents: torch.Tensor
    ids: torch.Tensor
    batch: int
    shift: float


def build_denoiser(layers: int = 8) -> WanTransformer3DModel:
    """9 million parameters at 8 layers, initialised as the original Wan is."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=256,
        ffn_dim=1024,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=1024,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.patch_embedding.weight.flatten(1))
    embedder = model.condition_embedder
    for linear in (embedder.text_embedder.linear_1, embedder.text_embedder.linear_2,
                   embedder.time_embedder.linear_1, embedder.time_embedder.linear_2):  # fmt: skip
        nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    return model


class BiasedCrossAttention:
    """Cross-attention with a bias per key (see `text.embed`), set before each forward pass; for training only."""

    bias: torch.Tensor

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        query, key, value = (
            states.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for states in (
                attn.norm_q(attn.to_q(hidden_states)),
                attn.norm_k(attn.to_k(encoder_hidden_states)),
                attn.to_v(encoder_hidden_states),
            )
        )
        logits = query @ key.mT / math.sqrt(query.shape[-1]) + self.bias
        output = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](output.type_as(hidden_states))


class Trainer:
    """Trains the denoiser, the text encoder frozen, and keeps a running average of the weights for the export."""

    def __init__(
        self, denoiser: WanTransformer3DModel, encoder: UMT5EncoderModel, empty_ids: torch.Tensor, device: torch.device
    ) -> None:
        self.denoiser, self.encoder, self.empty_ids, self.device = denoiser, encoder, empty_ids, device
        self.cross_attention = BiasedCrossAttention()
        for block in denoiser.blocks:
            block.attn2.set_processor(self.cross_attention)
        if device.type == "cuda":
            denoiser.compile_repeated_blocks(dynamic=False, fullgraph=True)
        self.parameters = list(denoiser.parameters())
        self.averages = [parameter.detach().clone() for parameter in self.parameters]
        matrices = [parameter for parameter in denoiser.blocks.parameters() if parameter.ndim == 2]
        ids = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in ids]
        fused = device.type == "cuda"
        self.muon = Muon(matrices, lr=MUON_RATE)
        self.adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
        self.step = 0

    def train(
        self, name: str, sets: list[Clips], seconds: float, *, decay: bool, warmup: int = 100, report_every: int = 200
    ) -> None:
        """Trains until `seconds` are over. Of every four steps the last takes the last set, the others the first."""
        clock, progress, steps, losses = workers.Clock(seconds, self.device), 0.0, 0, []
        while progress < 1:
            rate = min(1.0, (steps + 1) / warmup) * (max(0.0, 1 - progress) if decay else 1.0)
            loss = self._step(sets[-1 if steps % 4 == 3 else 0], rate)
            steps += 1
            if len(sets) == 1 or steps % 4:
                losses.append(loss)
            if steps % 10 == 0 or self.device.type == "cpu":
                progress = clock.progress()
            if steps in (10, 50) or steps % report_every == 0 or progress >= 1:
                recent = torch.stack(losses[-report_every:]).mean().item()
                print(f"{name} step {steps} {clock.elapsed():.0f}s loss {recent:.4f} rate {rate:.2f}", flush=True)

    def average_weights(self) -> None:
        """Replaces the weights by their running averages."""
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.averages)

    def _step(self, clips: Clips, rate: float) -> torch.Tensor:
        for optimizer, base in ((self.muon, MUON_RATE), (self.adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        loss = self._loss(clips)
        loss.backward()
        workers.average_gradients(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.muon.step()
        self.adam.step()
        self.muon.zero_grad()
        self.adam.zero_grad()
        self.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - min(0.999, (1 + self.step) / (10 + self.step)))
        return loss.detach()

    def _loss(self, clips: Clips) -> torch.Tensor:
        picked = torch.randint(len(clips.latents), (clips.batch,), device=self.device)
        variant = torch.randint(clips.ids.shape[1], (clips.batch,), device=self.device)
        clean, ids = clips.latents[picked].float(), clips.ids[picked, variant]
        unprompted = torch.rand(clips.batch, 1, device=self.device) < PROMPT_DROPOUT
        ids = torch.where(unprompted, self.empty_ids, ids)
        noise, level = torch.randn_like(clean), _noise_levels(clips.batch, clips.shift, self.device)
        share = level.view(-1, 1, 1, 1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            with torch.no_grad():
                embeddings, self.cross_attention.bias = embed(self.encoder, ids, _padded_lengths(ids))
            with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
                predicted = self.denoiser(
                    hidden_states=torch.lerp(clean, noise, share),
                    timestep=level * 1000,
                    encoder_hidden_states=embeddings,
                    return_dict=False,
                )[0]
        return F.mse_loss(predicted.float(), noise - clean)


def _noise_levels(count: int, shift: float, device: torch.device) -> torch.Tensor:
    """Shares of noise in 0..1: logit-normal, a fifth uniform so that both ends are seen, then shifted."""
    level = torch.randn(count, device=device).sigmoid()
    level = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), level)
    return shift * level / (1 + (shift - 1) * level)


def _padded_lengths(ids: torch.Tensor) -> torch.Tensor:
    """512 for most prompts, as the pipeline pads by default, now and then another length."""
    others = torch.tensor(OTHER_LENGTHS, device=ids.device)
    other = others[torch.randint(len(OTHER_LENGTHS), (len(ids),), device=ids.device)]
    return torch.where(torch.rand(len(ids), device=ids.device) < 0.85, PIPELINE_LENGTH, other)
