"""The demo's video autoencoder: diffusers' AutoencoderKLWan in its Wan 2.2 form, small, trained on rendered scenes."""

import math

import torch
import torch.nn.functional as F
from demo import workers
from demo.captions import Scene
from demo.convolution import frame_convolutions
from demo.muon import Muon
from demo.scenes import sample_scenes
from demo.videos import render
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify

PATCH = 2
CHANNELS = 16  # of the latents
KL_WEIGHT = 3e-4
MUON_RATE, ADAM_RATE = 0.02, 1e-3
PIXELS_AT_ONCE = 20_000_000


def build_autoencoder(encoder_width: int = 12, decoder_width: int = 16) -> AutoencoderKLWan:
    """Compresses 4x in time and 8x in space; 2.1 million parameters at the default widths."""
    return AutoencoderKLWan(
        base_dim=encoder_width,
        decoder_base_dim=decoder_width,
        z_dim=CHANNELS,
        dim_mult=[1, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        patch_size=PATCH,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of the latents of a video [n, 3, 4 k + 1, height, width] in -1..1.

    The same function as `vae.encode`, which goes through the video four frames at a time to save memory; here the first
    frame and all the others take one call each, which is several times faster for short clips.
    """
    vae.clear_cache()
    patches = patchify(video, PATCH)
    parts = [vae.encoder(part, feat_cache=vae._enc_feat_map, feat_idx=[0]) for part in patches.tensor_split([1], dim=2)]
    vae.clear_cache()
    mean, logvar = vae.quant_conv(torch.cat(parts, dim=2)).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """The video [n, 3, 4 k + 1, height, width] of raw latents, not clamped; in two calls, as `encode`."""
    vae.clear_cache()
    first, rest = vae.post_quant_conv(latents).tensor_split([1], dim=2)
    parts = [vae.decoder(first, feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)]
    parts.append(vae.decoder(rest, feat_cache=vae._feat_map, feat_idx=[0]))
    vae.clear_cache()
    return unpatchify(torch.cat(parts, dim=2), PATCH)


def train_autoencoder(
    vae: AutoencoderKLWan,
    seconds: float,
    device: torch.device,
    seed: int,
    *,
    side: int = 128,
    frames: int = 17,
    batch: int = 12,
    report_every: int = 250,
) -> None:
    """Trains in place until `seconds` are over, every fourth step on clips of 1.5 times the side."""
    parameters = list(vae.parameters())
    kernels = [p for p in parameters if p.ndim >= 4 and min(p.shape[:2]) >= 8]
    rest = [p for p in parameters if not any(p is kernel for kernel in kernels)]
    muon = Muon(kernels, lr=MUON_RATE)
    adam = torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.99), weight_decay=0, fused=device.type == "cuda")
    clock, step, progress = workers.Clock(seconds, device), 0, 0.0
    small = _Reconstruction(vae, batch, frames, side, device)
    large = _Reconstruction(vae, max(1, batch // 2), frames, side * 3 // 2 // 16 * 16, device)
    while progress < 1:
        rate = min(1.0, (step + 1) / 100) * max(0.0, 1 - progress)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = MUON_RATE * rate, ADAM_RATE * rate
        losses = (large if step % 4 == 3 else small).backward(seed + step)
        workers.average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        muon.step()
        adam.step()
        step += 1
        if step % 10 == 0 or device.type == "cpu":
            progress = clock.progress()
        if step % report_every == 0 or step == 20 or progress >= 1:
            l1, edges, kl, mse = losses.tolist()
            psnr = 10 * math.log10(4 / mse)
            print(
                f"vae step {step} {clock.elapsed():.0f}s l1 {l1:.4f} edges {edges:.4f} kl {kl:.2f} psnr {psnr:.1f}",
                flush=True,
            )


class _Reconstruction:
    """Loss and gradients for random clips of one size.

    On a GPU the passes are recorded once as a CUDA graph and replayed: their thousands of kernels are so small that
    launching them one by one would take longer than running them.
    """

    def __init__(self, vae: AutoencoderKLWan, batch: int, frames: int, side: int, device: torch.device) -> None:
        self.vae, self.frames, self.side, self.device = vae, frames, side, device
        self.parameters = list(vae.parameters())
        for parameter in self.parameters:  # replays write into the same gradients
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.video = torch.zeros(batch, 3, frames, side, side, device=device)
        self.graph = None
        if device.type == "cuda":
            self._draw(0)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._backward()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.losses = self._backward()

    def backward(self, seed: int) -> torch.Tensor:
        """Sets the gradients for scenes drawn with `seed`; returns L1, edge loss, KL and MSE, float32 [4]."""
        self._draw(seed)
        if self.graph is None:
            return self._backward()
        self.graph.replay()
        return self.losses

    def _draw(self, seed: int) -> None:
        scenes = sample_scenes(len(self.video), seed, two_things=0.4)
        self.video.copy_(render(scenes, self.frames, self.side, self.device))

    def _backward(self) -> torch.Tensor:
        torch._foreach_zero_([parameter.grad for parameter in self.parameters])
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)
        with half, frame_convolutions():
            mean, logvar = encode(self.vae, self.video)
            latents = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            output = decode(self.vae, latents).float()
        l1, mse = F.l1_loss(output, self.video), F.mse_loss(output, self.video)
        edges = _edge_loss(output, self.video)
        kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
        (l1 + mse + edges + KL_WEIGHT * kl).backward()
        return torch.stack([l1, edges, kl, mse]).detach()


@torch.no_grad()
def encode_scenes(
    vae: AutoencoderKLWan, seed: int, count: int, frames: int, side: int, device: torch.device
) -> tuple[torch.Tensor, list[Scene]]:
    """Raw latents of random scenes, and the scenes.

    The latents are bfloat16 [count, CHANNELS, (frames - 1) / 4 + 1, side / 8, side / 8].
    """
    scenes = sample_scenes(count, seed, two_things=0.35)
    latents, batch = [], max(1, PIXELS_AT_ONCE // (frames * side * side))
    for start in range(0, count, batch):
        video = render(scenes[start : start + batch], frames, side, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"), frame_convolutions():
            latents.append(encode(vae, video)[0].bfloat16())
    return torch.cat(latents), scenes


def set_latent_statistics(vae: AutoencoderKLWan, latents: torch.Tensor) -> None:
    """Writes mean and deviation per channel into the autoencoder's configuration, where WanPipeline looks for them."""
    sample = latents[:2048].float()
    mean = workers.average(sample.mean(dim=(0, 2, 3, 4)))
    std = workers.average(sample.std(dim=(0, 2, 3, 4)))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def normalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Raw latents as the denoiser sees them: mean 0 and deviation 1 per channel."""
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return ((latents - mean) / std).to(latents.dtype)


def _edge_loss(output: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    """L1 between neighbour differences in space and time: blur and flicker cost, a slight shift in tone does not."""
    error = output - video
    return sum(error.diff(dim=dim).abs().mean() for dim in (2, 3, 4)) / 3 * 2
