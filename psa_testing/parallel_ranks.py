"""What one rank of a test of context parallelism does; every function runs in a process of its own, with gloo."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch._dynamo.testing import CompileCounter

from psa_diffusers.families import find_family
from psa_diffusers.patch.attend import TokenAttention
from psa_diffusers.patch.dense_reasons import PSAFallbackError, PSAFallbackWarning
from psa_diffusers.patch.full_attention import FullAttention
from psa_diffusers.patch.parallel.collectives import CollectiveExchange
from psa_diffusers.patch.parallel.plan import context_parallel_plan
from psa_diffusers.patch.processor import PSAProcessor
from psa_diffusers.patch.stats import RunStats
from psa_presets import Preset
from psa_testing.cases import UNEVEN, Case
from psa_testing.expectations import EVERYTHING, SPARSE, assert_equal_to_rounding, preset
from psa_testing.families import CASES, PARALLEL
from psa_testing.tiny_pipelines import tiny_wan

# Named with its device: of plain gloo diffusers thinks that it is for the GPUs that PyTorch was built for.
GLOO = "cpu:gloo"
MODELS = {name: parallel.case for name, parallel in PARALLEL.items()}


def start(
    rank: int, ranks: int, folder: str, check: Callable[..., None], arguments: tuple, backend: str = GLOO
) -> None:
    """Make the process group, check, and leave it."""
    torch.set_num_threads(1)
    if backend == GLOO:
        # diffusers numbers accelerators, of which a CPU has none, and gathers tensors of unequal sizes, which gloo
        # cannot.
        torch.accelerator.device_count = lambda: 1
        dist.all_gather = all_gather
    else:
        torch.cuda.set_device(rank)
    store = Path(folder, "store")
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
    try:
        check(ranks, *arguments)
    finally:
        dist.destroy_process_group()


def all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> None:
    """As NCCL does it: every rank in turn sends its part to all."""
    tensor_list[dist.get_rank(group)].copy_(tensor)
    for rank, output in enumerate(tensor_list):
        dist.broadcast(output, group_src=rank, group=group)


def enable(pipe: Any, **config: Any) -> None:
    """Context parallelism of all the pipeline's transformers."""
    for transformer in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if transformer is not None:
            plan = context_parallel_plan(transformer)
            transformer.enable_parallelism(config=ContextParallelConfig(**config), cp_plan=plan)


def patch(pipe: Any, *arguments: Any, **settings: Any) -> PSAProcessor:
    """As a user does it."""
    processor = PSAProcessor(pipe, *arguments, **settings)
    processor.install()
    return processor


def one_run(case: Case, pipe: Any, inputs: dict[str, Any], chosen: Preset) -> tuple[torch.Tensor, RunStats]:
    """The output of a patched pipeline, which is left as it was, and what was computed."""
    processor = patch(pipe, chosen, strict=True)
    try:
        return case.run(pipe, **inputs), processor.stats()
    finally:
        processor.restore()


def alone_by_turns(ranks: int, calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """What calls give that a rank computes by itself: each call is computed by one rank, which tells the others."""
    found = {}
    for index, (key, call) in enumerate(calls.items()):
        found[key] = call() if index % ranks == dist.get_rank() else None
    for index, key in enumerate(calls):
        told = [found[key]]
        dist.broadcast_object_list(told, src=index % ranks)
        found[key] = told[0]
    return found


def equals_one_process(ranks: int, name: str, inputs: dict[str, Any], first: str, config: dict[str, Any]) -> None:
    """Dense, sparse with everything kept, and sparse: the output of all ranks is that of one process."""
    case, pipe = MODELS[name], MODELS[name].make()
    inputs = {"num_inference_steps": 3, **inputs}
    stock = case.run(pipe, **inputs)
    presets = {
        "dense": preset(dense_steps=1.0),
        "everything": EVERYTHING,
        "sparse": preset(dense_steps=0.5),
        "corrected": preset(dense_steps=0.25, correction=True),
        "reused": preset(dense_steps=0.25, refresh=2, share_guidance=True),
    }
    runs = {key: partial(one_run, case, pipe, inputs, chosen) for key, chosen in presets.items()}
    found = alone_by_turns(ranks, runs)
    alone, figures = ({key: each[part] for key, each in found.items()} for part in (0, 1))
    assert float((alone["sparse"] - stock).abs().max()) > 1e-3
    if first == "parallelism":
        enable(pipe, **config)
    for key, chosen in presets.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PSAFallbackWarning)
            processor = patch(pipe, chosen, strict=True)
            if pipe.transformer._parallel_config is None:
                enable(pipe, **config)
            assert_equal_to_rounding(case.run(pipe, **inputs), alone[key], (key, name))
            stats = processor.stats()
            assert stats.fallbacks == {} and stats.dense_steps == figures[key].dense_steps
            assert (stats.density_sparse is None) == (key == "dense")
            if stats.density_sparse is not None:
                assert stats.density_sparse == pytest.approx(figures[key].density_sparse, abs=1e-6, rel=0)
            processor.restore()
    if find_family(pipe.transformer).text == "none":
        assert_equal_to_rounding(case.run(pipe, **inputs), stock, "restored")


def compiled_blocks(ranks: int, name: str) -> None:
    """Compiled blocks attend as eager ones do; graphs break at the hooks of diffusers that split and join."""
    case, pipe = MODELS[name], MODELS[name].make()
    enable(pipe, ulysses_degree=ranks)
    processor = patch(pipe, preset(dense_steps=0.5), strict=True)
    eager, stats = case.run(pipe), processor.stats()
    for block in getattr(pipe.transformer, "blocks", None) or pipe.transformer.transformer_blocks:
        block.compile(backend="aot_eager")
    assert_equal_to_rounding(case.run(pipe), eager)
    assert processor.stats() == stats
    assert stats.density_sparse is not None and stats.density_sparse < 0.5


def forwards_compiled_before(ranks: int, name: str, inputs: dict[str, Any]) -> None:
    """What the hooks of context parallelism wrap is one whole graph, also where numbers of tokens are uneven."""
    case, pipe = MODELS[name], MODELS[name].make()
    counter = CompileCounter()
    for block in pipe.transformer.transformer_blocks:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    enable(pipe, ulysses_degree=ranks, ulysses_anything=True)
    processor = patch(pipe, preset(dense_steps=0.5), strict=True)
    with torch.compiler.set_stance("force_eager"):
        eager, stats = case.run(pipe, **inputs), processor.stats()
    assert counter.frame_count == 0
    assert_equal_to_rounding(case.run(pipe, **inputs), eager)
    assert counter.frame_count > 0 and processor.stats() == stats


def parts_travel_early(ranks: int) -> None:
    """Queries are on their way before keys are projected, and those before values; in a graph too."""
    pipe, events, hooks = tiny_wan(), [], []
    for block in pipe.transformer.blocks:
        for name in ("to_v", "to_k", "to_q"):
            layer: Any = getattr(block.attn1, name)
            hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: events.append(name)))
    exchange: Any = CollectiveExchange
    begin = exchange.begin

    def noted(self: CollectiveExchange, part: str, x: torch.Tensor) -> None:
        events.append("sent")
        begin(self, part, x)

    enable(pipe, ulysses_degree=ranks)
    patch(pipe, preset(dense_steps=0.0), strict=True)
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(exchange, "begin", noted)
        MODELS["wan"].run(pipe, num_inference_steps=1)
    layers, branches = len(pipe.transformer.blocks), 2
    assert events == ["to_q", "sent", "to_k", "sent", "to_v", "sent"] * layers * branches
    for hook in hooks:
        hook.remove()
    graphs: list[list[str]] = []

    def written(module: torch.fx.GraphModule, _: Any) -> Any:
        names = {"linear": "projected", "begin_exchange.default": "sent"}
        called = [names.get(str(getattr(node.target, "__name__", node.target))) for node in module.graph.nodes]
        graphs.append([name for name in called if name])
        return module

    for block in pipe.transformer.blocks:
        block.compile(backend=written)
    MODELS["wan"].run(pipe, num_inference_steps=1)
    found = [graph for graph in graphs if "sent" in graph]
    assert found
    for graph in found:
        first = graph.index("sent") - 1
        assert graph[first : first + 6] == ["projected", "sent"] * 3


def dense_by_the_operator(ranks: int, name: str) -> None:
    """With `dense_attention: psa`, for which the reference stands in here, each rank computes its heads."""
    FullAttention.implementation = "reference"
    case, pipe = MODELS[name], MODELS[name].make()
    stock = case.run(pipe)
    enable(pipe, ulysses_degree=ranks)
    processor = patch(pipe, preset(dense_steps=1.0, dense_attention="psa"), strict=True)
    assert_equal_to_rounding(case.run(pipe), stock)
    stats = processor.stats()
    assert stats.dense_implementation == "reference" and stats.density_run == 1 and stats.fallbacks == {}


def a_spoiled_layer(ranks: int, name: str) -> None:
    """All ranks compute a forward again in which any layer was not finite, as one process does."""
    case, pipe = MODELS[name], MODELS[name].make()
    layer = list(find_family(pipe.transformer).self_attentions(pipe.transformer))[1]
    forwards: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))
    model: Any = type(pipe.transformer)
    attention: Any = TokenAttention
    forward, sparse = model.forward, attention.sparse
    computed: list[int] = []

    def counted(self: Any, *arguments: Any, **settings: Any) -> Any:
        computed.append(1)
        return forward(self, *arguments, **settings)

    def spoiled(self: TokenAttention, which: Any, at: Any, *arguments: Any) -> Any:
        (head, tail), stats = sparse(self, which, at, *arguments)
        return (head * float("nan") if (which.name, at.step) == (layer, 2) else head, tail), stats

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PSAFallbackWarning)
        model.forward, attention.sparse = counted, spoiled
        try:
            for shared in (False, True):
                if shared:
                    enable(pipe, ulysses_degree=ranks)
                computed.clear()
                forwards.clear()
                processor = patch(pipe, preset(dense_steps=0.5))
                found.append(case.run(pipe))
                assert processor.stats().not_finite == {layer: [2]}
                assert len(computed) - len(forwards) == 1
                processor.restore()
        finally:
            model.forward, attention.sparse = forward, sparse
    assert found[1].isfinite().all()
    assert_equal_to_rounding(found[1], found[0])


def spoiled_heads(ranks: int, dense_too: bool) -> None:
    """What one rank finds in its heads all act on: they compute the forward again, and not where that is in vain."""
    case, pipe = MODELS["hunyuan-video"], MODELS["hunyuan-video"].make()
    layer = list(find_family(pipe.transformer).self_attentions(pipe.transformer))[1]
    model: Any = type(pipe.transformer)
    attention: Any = TokenAttention
    forward, sparse = model.forward, attention.sparse
    computed: list[int] = []
    forwards: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: forwards.append(1))

    def counted(self: Any, *arguments: Any, **settings: Any) -> Any:
        computed.append(1)
        return forward(self, *arguments, **settings)

    def spoiled(self: TokenAttention, which: Any, at: Any, qkv: Any, *arguments: Any) -> Any:
        (head, tail), stats = sparse(self, which, at, qkv, *arguments)
        if (which.name, at.step, dist.get_rank()) != (layer, 2, 1):
            return (head, tail), stats
        if dense_too:
            qkv[2].fill_(float("nan"))
        return (head * float("nan"), tail), stats

    enable(pipe, ulysses_degree=ranks)
    processor = patch(pipe, preset(dense_steps=0.5))
    with pytest.MonkeyPatch.context() as changed, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        changed.setattr(model, "forward", counted)
        changed.setattr(attention, "sparse", spoiled)
        output = case.run(pipe, num_inference_steps=4)
    assert len(computed) - len(forwards) == 1
    assert bool(output.isfinite().all()) is not dense_too
    told = [str(entry.message) for entry in caught if "not finite" in str(entry.message)]
    if dense_too:
        assert len(told) == 1 and "the model itself made values that are not finite" in told[0]
    else:
        assert processor.stats().not_finite == ({layer: [2]} if dist.get_rank() == 1 else {})


def ring_is_dense(ranks: int) -> None:
    """With a dense operation that tells its normaliser, which torch's for the CPU does not."""
    from diffusers.models import attention_dispatch

    def attend(ctx, query, key, value, *arguments, return_lse=False, **settings):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return (logits.softmax(-1) @ value).transpose(1, 2), logits.logsumexp(-1).transpose(1, 2)

    attention_dispatch._native_attention_forward_op = attend
    for name in ("wan", "ltx"):
        case, pipe = MODELS[name], MODELS[name].make()
        stock = case.run(pipe)
        enable(pipe, ring_degree=ranks)
        processor = patch(pipe, SPARSE)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_equal_to_rounding(case.run(pipe), stock)
        messages = [str(entry.message) for entry in caught if entry.category is PSAFallbackWarning]
        assert len(messages) == 1 and "ring attention shows a rank only a part of the keys at a time" in messages[0]
        assert processor.stats().density_run == 1 and processor.stats().fallbacks
        processor.restore()
        patch(pipe, SPARSE, strict=True)
        raises(PSAFallbackError, "ring attention", partial(case.run, pipe))
    pipe = MODELS["cogvideox-5b"].make()
    enable(pipe, ring_degree=ranks)
    patch(pipe, SPARSE)
    raises(ValueError, f"CogVideoX cannot run with ring_degree={ranks}", lambda: MODELS["cogvideox-5b"].run(pipe))


def what_cannot_be_shared_is_refused(ranks: int) -> None:
    case = MODELS["hunyuan-video"]
    pipe = case.make()
    enable(pipe, ulysses_degree=ranks)
    processor = patch(pipe, SPARSE)
    message = f"105 video tokens cannot be shared by ulysses_degree={ranks} ranks"
    if hasattr(ContextParallelConfig, "ulysses_anything"):
        message += ".*ulysses_anything=True"
    raises(ValueError, message, lambda: case.run(pipe, **UNEVEN))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        processor.restore()
    said = str(caught[-1].message)
    assert "without PSAProcessor, HunyuanVideo computes wrong attention in this context parallelism" in said
    gradients_are_refused(case, ranks)
    pipe = tiny_wan(heads=3, head_dim=16, num_layers=1)
    enable(pipe, ulysses_degree=ranks)
    patch(pipe, SPARSE)
    raises(ValueError, f"3 heads cannot be shared by ulysses_degree={ranks} ranks", lambda: MODELS["wan"].run(pipe))
    pipe = MODELS["ltx"].make()
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
    patch(pipe, SPARSE)
    raises(ValueError, "LTX-Video needs enable_parallelism.*context_parallel_plan", lambda: MODELS["ltx"].run(pipe))
    pipe = MODELS["ltx-condition"].make()
    enable(pipe, ulysses_degree=ranks)
    patch(pipe, SPARSE)
    message = "this rank has 192 video tokens instead of 160 of 320.*no conditions beside the video"
    raises(RuntimeError, message, lambda: MODELS["ltx-condition"].run(pipe, frame_index=8, num_frames=17))
    tokens = CASES["hunyuan-video-i2v"].make().transformer
    raises(ValueError, "no plan for context parallelism of HunyuanVideo", lambda: context_parallel_plan(tokens))


def gradients_are_refused(case: Case, ranks: int) -> None:
    """Where the exchange would lose them: attention of joint text is the patch's own, also dense."""
    pipe, given = case.make(), []
    enable(pipe, ulysses_degree=ranks)
    processor = patch(pipe, SPARSE)
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True)
    case.run(pipe, num_inference_steps=2)
    args, kwargs = given[0]
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", PSAFallbackWarning)
        raises(
            RuntimeError,
            "gradients are asked for, and what ranks exchange has none",
            lambda: pipe.transformer(*args, **kwargs),
        )
    processor.restore()


def raises(kind: type[Exception], message: str, call: Callable[[], Any]) -> None:
    import re

    try:
        call()
    except kind as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError(f"no {kind.__name__}")


def an_example(ranks: int, path: str, settings: dict[str, Any]) -> None:
    """What a script of examples/ does on each rank."""
    import runpy

    runpy.run_path(path)["main"](**settings)
