"""The models that `--model` knows by a short name: where they are and how their cards say to run them."""

from psa_diffusers.families import MODULES
from psa_diffusers.families.card import ModelCard

DEMO = ModelCard(
    name="demo",
    hub_id=None,
    about="bundled tiny Wan trained on moving shapes; offline, runs on a CPU",
    height=192,
    width=192,
    frames=33,
    steps=16,
    guidance=4.0,
    negative_prompt="",
    min_tokens=2048,  # it shows quality: --compare says what it gains
)

# The demo first, then those of each family, as its file lists them.
_CARDS: tuple[ModelCard, ...] = (DEMO, *(card for module in MODULES for card in getattr(module, "CARDS", ())))
MODELS: dict[str, ModelCard] = {card.name: card for card in _CARDS}
