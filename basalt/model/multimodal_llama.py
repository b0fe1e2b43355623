"""The assistant's model: tower + projector + any causal LM of the Llama or Qwen2 type.

An image in the prompt is a run of `image_token_id`, as many as the tower gives tokens, put there when the
text was tokenised. The model only replaces them by visual tokens, and refuses if the counts differ. The
same composition, weights and numbers as transformers' `LlavaForConditionalGeneration`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from basalt.data.packing import Packed
from basalt.data.preprocess import IGNORE
from basalt.model.attention import SEGMENTS
from basalt.model.projector import Projector
from basalt.model.vision_encoder import VisionEncoder

LOSS_CHUNK = 2048  # positions whose logits are held at once, in float32 over the whole vocabulary
HIDDEN = -3.0e4  # added to the scores of what must not be seen; finite, so that padding rows stay finite too


class MultimodalLlama(nn.Module):
    """See the module's docstring.

    Args:
        tower: None where features or visual tokens come from outside (a cache, the vision service).
        lm: a causal LM of transformers, plain or wrapped by peft.
    """

    def __init__(self, tower: VisionEncoder | None, projector: Projector, lm: nn.Module, image_token_id: int) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.lm: Any = lm  # transformers' and peft's classes share no type that states what is used here
        self.image_token_id = image_token_id

    @property
    def causal_lm(self) -> Any:
        """The LM below peft's wrapper, its LoRA layers in place."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    def visual_tokens(self, pixels: Tensor) -> Tensor:
        """Images `[N, 3, S, S]` → visual tokens `[N, tokens, lm_dim]`."""
        if self.tower is None:
            raise ValueError("this model has no tower: give features instead of pixels")
        return self.project(self.tower(pixels))

    def project(self, features: Tensor) -> Tensor:
        """Patch features `[N, tokens, tower_dim]` → visual tokens `[N, tokens, lm_dim]`."""
        return self.projector(features.to(self.projector.linear_1.weight.dtype))

    def embed(self, ids: Tensor, visual: Tensor | None, expected: int | None = None) -> Tensor:
        """Token embeddings `[B, T, lm_dim]` with visual tokens in the place of image tokens, in order.

        Args:
            ids: `[B, T]`.
            visual: `[N, tokens, lm_dim]` of all images of the batch in reading order, or None without images.
            expected: how many image tokens `ids` hold; None counts them, for which the device has to be waited for.

        Raises:
            ValueError: there are more or fewer image tokens than visual tokens.
        """
        embedded = self.lm.get_input_embeddings()(ids)
        places = ids == self.image_token_id
        expected = int(places.sum()) if expected is None else expected
        given = 0 if visual is None else visual.shape[0] * visual.shape[1]
        if expected != given:
            raise ValueError(f"the prompts hold {expected} image tokens, the images give {given} visual tokens")
        if visual is None:
            return embedded
        flat = visual.reshape(-1, visual.shape[-1]).to(embedded.dtype)
        return embedded.masked_scatter(places[..., None], flat)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        *,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of a padded batch, and the mean loss where labels are given.

        Args:
            ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, 1 on real tokens.
            pixels, features: the images of the whole batch in order, as pixels or as tower features.
            labels: `[B, T]`, `IGNORE` where nothing is to be learned.

        Returns:
            Logits `[B, T, vocab]` and the scalar loss or None.
        """
        visual = self.visual_tokens(pixels) if pixels is not None else None
        visual = self.project(features) if features is not None else visual
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
        output = self.lm(
            inputs_embeds=self.embed(ids, visual),
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        )
        if labels is None:
            return output.logits, None
        predicted, wanted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return output.logits, cross_entropy(predicted.float(), wanted, ignore_index=IGNORE)

    def packed_loss(self, batch: Packed, features: Tensor | None) -> Tensor:
        """Sum of the losses of a packed batch; logits are computed only where something is learned.

        It has a backward pass through all layers even where none is needed, as without images in stage 1, or where
        all rows of a pass turned out broken: all passes are compiled alike, and the layers that `parallel.shard` cut
        up are put together by all processes at once.

        Args:
            features: `[len(batch.images), tokens, tower_dim]`, or None without images.

        Raises:
            ValueError: there are more or fewer image tokens than visual tokens.
        """
        visual = self.project(features) if features is not None else None
        embedded = self.embed(batch.ids, visual, batch.image_tokens)
        if torch.is_grad_enabled():
            embedded.requires_grad_()
        supervised = self._learned(batch, embedded)[batch.source]  # [K, lm_dim]
        if len(supervised) <= LOSS_CHUNK:
            return self._token_loss(supervised, batch.target)
        parts = zip(supervised.split(LOSS_CHUNK), batch.target.split(LOSS_CHUNK), strict=True)
        # Recomputed in the backward pass, so that only one chunk's logits are there at a time.
        return torch.stack([checkpoint(self._token_loss, *part, use_reentrant=False) for part in parts]).sum()  # type: ignore[misc]

    def _learned(self, batch: Packed, embedded: Tensor) -> Tensor:
        """Last hidden states where something is learned, `[learned, lm_dim]`."""
        lm, given = self.causal_lm, {"position_ids": batch.positions, "use_cache": False}
        if lm.config._attn_implementation == SEGMENTS:
            no_mask = batch.ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)  # for none, transformers would make one
            return lm.model(
                inputs_embeds=embedded, attention_mask=no_mask, segments=batch.segments, **given
            ).last_hidden_state[0]
        visible = batch.attention_mask()
        mask = torch.zeros_like(visible, dtype=embedded.dtype).masked_fill_(~visible, HIDDEN)
        hidden = lm.model(inputs_embeds=embedded, attention_mask=mask, **given).last_hidden_state
        return hidden.flatten(0, 1)[batch.segments.learned]

    def _token_loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        logits = self.causal_lm.lm_head(hidden)  # [chunk, vocab]
        return cross_entropy(logits.float(), target, reduction="sum")

    @torch.inference_mode()
    def generate(self, ids: Tensor, attention_mask: Tensor, visual: Tensor | None, **options: Any) -> Tensor:
        """New tokens `[B, new]` after left-padded prompts `[B, T]`; options go to transformers' `generate`."""
        embedded = self.embed(ids, visual)
        return self.lm.generate(inputs_embeds=embedded, attention_mask=attention_mask, **options)
