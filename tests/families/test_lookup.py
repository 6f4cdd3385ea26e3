"""Which family a transformer is of: by its class, or by that of diffusers which it is derived from."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

from psa_diffusers.families import FAMILIES, UnsupportedModelError, find_family
from psa_diffusers.families.lookup import REASONS
from psa_diffusers.families.wan import Wan
from psa_testing.tiny_pipelines import tiny_transformer


def made_of(kind: type) -> torch.nn.Module:
    """A module of a class, without anything in it."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


class Named(WanTransformer3DModel):
    """A subclass that only adds to its base class."""

    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


class Reversed(WanTransformer3DModel):
    """A subclass whose tokens come in another order."""

    def forward(self, hidden_states, *arguments, **settings):
        return super().forward(hidden_states.flip(2), *arguments, **settings)


class Twice(Reversed):
    """A subclass of one that is refused."""


def test_a_subclass_is_its_base_class():
    assert find_family(made_of(Named)) is Wan
    assert find_family(made_of(type("Vace", (WanVACETransformer3DModel,), {}))) is Wan


@pytest.mark.parametrize("kind", [Reversed, Twice])
def test_a_subclass_with_a_forward_of_its_own_is_refused(kind):
    message = f"^{kind.__name__} is not supported, because its forward is not that of WanTransformer3DModel, "
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_family(made_of(kind))
    assert len(str(caught.value).splitlines()) == 1


def test_the_nearest_known_class_decides(monkeypatch):
    """As where diffusers derives a model that is not supported from one that is."""
    kind = type("WanAnimate2Transformer3DModel", (WanTransformer3DModel,), {"__module__": "diffusers.models.new"})
    with pytest.raises(UnsupportedModelError, match="reference tokens of its own frame"):
        find_family(made_of(type("Mine", (kind,), {})))
    kind = type("NewTransformer3DModel", (WanTransformer3DModel,), {"__module__": "diffusers.models.new"})
    kind.forward = lambda self, hidden_states: hidden_states
    new = type("New", (Wan,), {"transformers": ("NewTransformer3DModel",)})
    monkeypatch.setattr("psa_diffusers.families.FAMILIES", (*FAMILIES, new))
    assert find_family(made_of(type("Mine", (kind,), {}))) is new


def test_a_class_of_the_same_name_is_not_the_same():
    kind = type("WanTransformer3DModel", (torch.nn.Module,), {"__module__": "elsewhere.models"})
    with pytest.raises(UnsupportedModelError, match=r"it is of elsewhere\.models, and only that of diffusers is known"):
        find_family(made_of(kind))


def test_other_models_are_refused_with_their_reason():
    with pytest.raises(UnsupportedModelError, match=r"no family in psa_diffusers\.families describes its attention"):
        find_family(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match=r"space and time apart.*; supported: Wan 2\.1 and 2\.2, Hun"):
        find_family(made_of(diffusers.LatteTransformer3DModel))


def test_cosmos_3_is_refused_for_its_keys():
    if not hasattr(diffusers, "Cosmos3OmniTransformer"):
        pytest.skip("this diffusers has no Cosmos 3")
    with pytest.raises(UnsupportedModelError, match="because its tokens are packed without a batch axis"):
        find_family(made_of(diffusers.Cosmos3OmniTransformer))


def test_no_class_is_both_supported_and_not():
    known = [name for family in FAMILIES for name in family.transformers]
    assert len(known) == len(set(known)) and not set(known) & set(REASONS)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank", "one_thread")
def test_a_transformer_that_fsdp_shards_is_what_it_was():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has fully_shard elsewhere")
    from torch.distributed.device_mesh import init_device_mesh

    transformer = tiny_transformer(num_layers=1)
    fsdp.fully_shard(transformer, mesh=init_device_mesh("cpu", (1,)))
    assert type(transformer).__name__ == "FSDPWanTransformer3DModel"
    assert find_family(transformer) is Wan
