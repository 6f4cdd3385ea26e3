"""The demo's tokenizer and text encoder, and prompt embeddings as WanPipeline feeds them to its transformer."""

import math
import random

import torch
from demo import workers
from demo.captions import caption, words
from demo.scenes import sample_scenes
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
PIPELINE_LENGTH = 512  # WanPipeline's default max_sequence_length
TRAINED_TOKENS = 39  # the longest caption with room to spare; one more key stands for all padding
WIDTH = 128
PARTS = 3
CODE_SHARE = 0.7  # length of the code for a word's part, of the word's own vector


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, case and punctuation ignored; words outside the grammar become <unk>."""
    vocabulary = {word: index for index, word in enumerate((PAD, END, UNKNOWN, *words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(r".", " "), normalizers.Replace(",", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=PIPELINE_LENGTH,
        padding_side="right",
    )


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """A UMT5 encoder of two layers, 0.4 million parameters."""
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


def train_text_encoder(
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    seconds: float,
    device: torch.device,
    seed: int,
    *,
    batch: int = 64,
    report_every: int = 200,
) -> None:
    """Teaches the encoder, from captions alone, which object a word speaks of; the denoiser then trains with it frozen.

    Each word's output becomes a mix of what it is now and a code for its part of the sentence: first object, second
    object, background. Trained from the videos' loss alone, the encoder first learned to let no word see another, which
    makes the denoiser paint a red star over a blue wall as a blue star over a red wall every other time.
    """
    words_alone = _outputs_alone(encoder, len(tokenizer), device)
    size = words_alone.norm(dim=-1).mean()
    codes = torch.linalg.qr(torch.randn(WIDTH, PARTS, generator=torch.Generator().manual_seed(0))).Q.T.to(device)
    targets = words_alone[:, None] + CODE_SHARE * size * codes
    targets = targets / targets.norm(dim=-1, keepdim=True) * size
    _soften_attention(encoder)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0)
    clock, rng, step, progress = workers.Clock(seconds, device), random.Random(seed), 0, 0.0
    while progress < 1:
        optimizer.param_groups[0]["lr"] = 1e-3 * max(0.0, 1 - progress)
        scenes = sample_scenes(batch, rng.randrange(2**40), two_things=0.5, apart=False)
        ids = tokenize(tokenizer, [caption(scene, rng) for scene in scenes]).to(device)
        mask = ids != 0
        outputs = encoder(ids, mask.long()).last_hidden_state
        error = (outputs - targets[ids, parts(tokenizer, ids)]).square().sum(-1) / size**2
        loss = (error * mask).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        workers.average_gradients(list(encoder.parameters()))
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            progress = clock.progress()
        if step % report_every == 0 or progress >= 1:
            print(f"text step {step} {clock.elapsed():.0f}s error {loss.item():.4f}", flush=True)


def parts(tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor) -> torch.Tensor:
    """Which part of its sentence each token is in: 0 the first object, 1 the second, 2 the background; like `ids`."""
    second, background = ((ids == tokenizer.convert_tokens_to_ids(word)).cumsum(1) for word in ("and", "over"))
    return torch.where(background > 0, 2, second.clamp(max=1))


@torch.no_grad()
def _outputs_alone(encoder: UMT5EncoderModel, vocabulary: int, device: torch.device) -> torch.Tensor:
    """The encoder's output for each word as a sentence of its own, [vocabulary, WIDTH]."""
    ids = torch.arange(vocabulary, device=device).unsqueeze(1)
    return encoder(ids, torch.ones_like(ids)).last_hidden_state[:, 0].clone()


@torch.no_grad()
def _soften_attention(encoder: UMT5EncoderModel) -> None:
    """Starts attention over by position, two heads looking back and two ahead, near and far, and hardly by content."""
    distance = torch.arange(16)
    slopes = ((0.0, -4.0), (-4.0, 0.0))
    for block in encoder.encoder.block:
        attention = block.layer[0].SelfAttention
        attention.q.weight.normal_(std=0.1 / WIDTH**0.5)
        attention.k.weight.normal_(std=1 / WIDTH**0.5)
        bias = attention.relative_attention_bias.weight  # [32 buckets, heads]: 0..15 behind, 16..31 ahead
        for head in range(bias.shape[1]):
            decay = (0.5, 0.1)[head // 2]
            behind, ahead = slopes[head % 2]
            bias[:16, head] = (behind - decay * distance).to(bias)
            bias[16:, head] = (ahead - decay * distance).to(bias)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Token ids, int64 [len(captions), TRAINED_TOKENS], padded on the right."""
    encoded = tokenizer(captions, padding="max_length", max_length=TRAINED_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids


def embed(
    encoder: UMT5EncoderModel, ids: torch.Tensor, padded_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings and the key bias with which they act like embeddings padded to `padded_length` tokens.

    WanPipeline pads with zeros, up to 512, and masks nothing. All those tokens are the same key and value, so one of
    them with ln(their number) added to its logits gives the same cross-attention at a twelfth of the cost.

    Args:
        ids: int64 [batch, TRAINED_TOKENS].
        padded_length: int64 [batch], the length that the pipeline would pad to.

    Returns:
        Embeddings [batch, TRAINED_TOKENS + 1, WIDTH], zero from the first padding token on; bias float32
        [batch, 1, 1, TRAINED_TOKENS + 1]: 0 for words, -inf for the padding left over, ln(count) for the last token.
    """
    mask = ids != 0
    embeddings = encoder(ids, mask.long()).last_hidden_state * mask.unsqueeze(-1)
    embeddings = torch.cat([embeddings, torch.zeros_like(embeddings[:, :1])], dim=1)
    padding = (padded_length - mask.sum(1)).clamp(min=0).float().log().unsqueeze(1)
    bias = torch.cat([torch.zeros_like(ids, dtype=torch.float32).masked_fill(~mask, -math.inf), padding], dim=1)
    return embeddings, bias[:, None, None, :]
