"""Measures the demo model on prompts it was never trained on, by looking at the pixels.

Every fourth prompt names two objects. A colour is right if the vivid pixels of the video have it, a motion if the path
of their centroid (or their area) shows it. A pair counts as right only if all its objects are.

    python scripts/eval_demo.py --model psa_diffusers/demo --preset dense --pairs 48 --steps 20
"""

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from demo.captions import caption
from demo.checks import Verdict, judge, sightings
from demo.scenes import sample_scenes
from demo.sheets import save_sheet
from diffusers import WanPipeline

TWO_THINGS = 0.25
HELD_OUT_SEED = 987654321


def main() -> None:
    args = _arguments()
    singles = round(args.pairs * (1 - TWO_THINGS))
    scenes = sample_scenes(singles, HELD_OUT_SEED, held_out=True, two_things=0)
    scenes += sample_scenes(args.pairs - singles, HELD_OUT_SEED + 1, held_out=True, two_things=1)
    prompts = [caption(scene) for scene in scenes]

    pipeline = WanPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype)).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    started = time.monotonic()
    videos = []
    with _patched(pipeline, args.preset):
        for first in range(0, args.pairs, args.batch):
            videos.append(_generate(pipeline, prompts[first : first + args.batch], first, args))
            print(f"{min(first + args.batch, args.pairs)}/{args.pairs} {time.monotonic() - started:.0f}s", flush=True)
    videos = torch.cat(videos)
    seconds = time.monotonic() - started

    verdicts = [judge(sightings(video), scene) for video, scene in zip(videos, scenes, strict=True)]
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        if verdict.motions_right < verdict.things:
            print(f"wrong: {'motion' if verdict.colours_right == verdict.things else 'colour'}: {prompt}")
    figures = {
        "model": str(args.model),
        "preset": args.preset,
        "pairs": args.pairs,
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "size": [args.frames, args.side, args.side],
        "device": args.device,
        "dtype": args.dtype,
        "seconds": round(seconds, 1),
        "all": _shares(verdicts),
        "one_object": _shares([v for v in verdicts if v.things == 1]),
        "two_objects": _shares([v for v in verdicts if v.things == 2]),
    }
    print(f"{'':14}{'pairs':>6}{'colour right':>14}{'motion right':>14}")
    for name in ("one_object", "two_objects", "all"):
        row = figures[name]
        print(f"{name:14}{row['pairs']:>6}{row['colour_right']:>14.1%}{row['motion_right']:>14.1%}")
    if args.sheet:
        step = max(1, len(videos) // args.sheet_rows)
        save_sheet(args.sheet, videos[::step][: args.sheet_rows], prompts[::step][: args.sheet_rows])
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


def _generate(pipeline: WanPipeline, prompts: list[str], first: int, args: argparse.Namespace) -> torch.Tensor:
    """Videos [len(prompts), 3, frames, side, side] in -1..1, on the CPU; prompt i has the seed `args.seed + i`."""
    generators = [torch.Generator("cpu").manual_seed(args.seed + first + i) for i in range(len(prompts))]
    output = pipeline(
        prompts,
        height=args.side,
        width=args.side,
        num_frames=args.frames,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=generators,
        output_type="pt",
    )
    return output.frames.float().cpu().transpose(1, 2) * 2 - 1


def _patched(pipeline: WanPipeline, preset: str):
    if preset == "dense":
        return nullcontext()
    from psa_diffusers import apply_psa

    return apply_psa(pipeline, preset)


def _shares(verdicts: list[Verdict]) -> dict[str, float]:
    count = len(verdicts)
    return {
        "pairs": count,
        "colour_right": round(sum(v.colours_right == v.things for v in verdicts) / count, 4) if count else 0.0,
        "motion_right": round(sum(v.motions_right == v.things for v in verdicts) / count, 4) if count else 0.0,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "psa_diffusers" / "demo")
    parser.add_argument("--preset", default="dense", help="a preset of psa_diffusers, or dense")
    parser.add_argument("--pairs", type=int, default=48, help="prompt and seed pairs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--side", type=int, default=192)
    parser.add_argument("--seed", type=int, default=0, help="of the first pair; the others count on")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--sheet", type=Path, help="write frames of some videos as PNG")
    parser.add_argument("--sheet-rows", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
