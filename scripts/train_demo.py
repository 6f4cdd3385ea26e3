"""Trains the bundled demo model: a small text-to-video WanPipeline that knows coloured shapes in motion.

Four phases, each with its own seconds: the text encoder, the autoencoder, the denoiser on short clips, the denoiser on
full-size clips. Ends by writing a folder that WanPipeline.from_pretrained loads; `--resume` goes on from such a folder
with the phases that are asked for. On two GPUs, in runs of at most ten minutes:

    torchrun --nproc-per-node 2 scripts/train_demo.py --output run1 --text-seconds 20 --vae-seconds 300 \\
        --short-seconds 150 --keep-rate
    torchrun --nproc-per-node 2 scripts/train_demo.py --output run2 --resume run1 --short-seconds 100 \\
        --full-seconds 400 --seed 1

The bundled weights come from three such runs; the text encoder was taught its part of the sentence (--text-seconds)
before the third, which had 100 seconds of short and 295 of full-size clips.

With one GPU, or to rehearse everything in a minute on a CPU:

    python scripts/train_demo.py --output /tmp/rehearsal --tiny --vae-seconds 5 --short-seconds 5 --full-seconds 5
"""

import argparse
import random
import time
from pathlib import Path

import torch
from demo import autoencoder, denoiser, export, text, workers
from demo.captions import caption

CAPTION_VARIANTS = 4
SEEDS_APART = 10**8  # between runs, processes and phases: no scene is drawn twice


def main() -> None:
    args = _arguments()
    started = time.monotonic()
    rank, count, device = workers.start()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if args.resume:
        tokenizer, encoder, vae, model = export.load(args.resume, device)
    else:
        tokenizer = text.build_tokenizer()
        encoder = text.build_text_encoder(len(tokenizer)).to(device)
        vae = autoencoder.build_autoencoder(*(4, 4) if args.tiny else ()).to(device)
        model = denoiser.build_denoiser(2 if args.tiny else 8).to(device)
    workers.share_weights([encoder, vae, model])
    seed = SEEDS_APART * (10 * (args.seed * count + rank) + 1)
    torch.manual_seed(seed)

    def say(message: str) -> None:
        if rank == 0:
            print(f"[{time.monotonic() - started:.0f}s] {message}", flush=True)

    say(f"start on {count} x {device.type}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M in the denoiser, "
        f"{sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M in the autoencoder")  # fmt: skip
    if args.text_seconds:
        text.train_text_encoder(encoder, tokenizer, args.text_seconds, device, seed)
    encoder.eval().requires_grad_(False)
    if args.vae_seconds:
        autoencoder.train_autoencoder(
            vae, args.vae_seconds, device, seed, side=args.short_side, frames=args.short_frames, batch=args.vae_batch
        )
    vae.eval().requires_grad_(False)

    def save() -> None:
        if rank == 0:
            export.export(args.output, tokenizer, encoder, vae, model)
        say(f"wrote {args.output}")

    def clips(number: int, frames: int, side: int, batch: int, shift: float, seed: int) -> denoiser.Clips:
        latents, scenes = autoencoder.encode_scenes(vae, seed, number, frames, side, device)
        if args.vae_seconds and not args.statistics_done:
            autoencoder.set_latent_statistics(vae, latents)
            args.statistics_done = True
        rng = random.Random(seed)
        ids = [text.tokenize(tokenizer, [caption(s, rng) for s in scenes]) for _ in range(CAPTION_VARIANTS)]
        say(f"encoded {number} clips of {frames}x{side}x{side}")
        return denoiser.Clips(autoencoder.normalised(vae, latents), torch.stack(ids, dim=1).to(device), batch, shift)

    args.statistics_done = False
    trainer = denoiser.Trainer(model, encoder, text.tokenize(tokenizer, [""]).to(device), device)
    short = clips(args.short_clips, args.short_frames, args.short_side, args.short_batch, 3.0, seed + SEEDS_APART)
    save()
    if args.short_seconds:
        trainer.train("short", [short], args.short_seconds, decay=False)
        save()
    if args.full_seconds:
        full = clips(args.full_clips, args.full_frames, args.full_side, args.full_batch, 3.0, seed + 2 * SEEDS_APART)
        trainer.train("full", [full, short], args.full_seconds, decay=not args.keep_rate)
    trainer.average_weights()
    save()
    workers.stop()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--resume", type=Path, help="folder that an earlier run wrote")
    parser.add_argument("--seed", type=int, default=0, help="another one for each run, so that the scenes are new")
    parser.add_argument("--text-seconds", type=float, default=0)
    parser.add_argument("--vae-seconds", type=float, default=0)
    parser.add_argument("--short-seconds", type=float, default=0)
    parser.add_argument("--full-seconds", type=float, default=0)
    parser.add_argument("--keep-rate", action="store_true", help="no learning rate decay: another run follows")
    parser.add_argument("--vae-batch", type=int, default=12, help="this and other counts: per process")
    parser.add_argument("--short-clips", type=int, default=20000)
    parser.add_argument("--short-batch", type=int, default=64)
    parser.add_argument("--short-frames", type=int, default=17)
    parser.add_argument("--short-side", type=int, default=128)
    parser.add_argument("--full-clips", type=int, default=8000)
    parser.add_argument("--full-batch", type=int, default=24)
    parser.add_argument("--full-frames", type=int, default=33)
    parser.add_argument("--full-side", type=int, default=192)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: few layers, clips and pixels")
    args = parser.parse_args()
    if args.tiny:
        args.vae_batch, args.short_batch, args.full_batch = 2, 4, 2
        args.short_clips, args.full_clips = 8, 4
        args.short_frames, args.short_side, args.full_frames, args.full_side = 5, 16, 9, 32
    return args


if __name__ == "__main__":
    main()
