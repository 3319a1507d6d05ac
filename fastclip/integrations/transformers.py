"""Hugging Face's CLIPModel and SiglipModel, trained without the N x N logits.

With return_loss=True, forward gives the loss and the embeddings, and logits_per_image = logits_per_text = None. Without
it, forward is Hugging Face's own, logits and all, for zero-shot use. Weights, configuration and checkpoints are the
same.

    model = CLIPModel.from_pretrained(...)        # from here instead of from transformers
    patch(model)                                  # or: a model that is already there

Legend: image_embeds, text_embeds [N, D], of length 1; logit_scale is the parameter, its exponential the multiplier.
"""

from torch import Tensor

from fastclip.loss import clip_loss, siglip_loss

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "fastclip.integrations.transformers needs Hugging Face's transformers: pip install transformers"
    ) from error
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.utils import can_return_tuple

__all__ = ["CLIPModel", "SiglipModel", "patch", "unpatch"]


class CLIPModel(transformers.CLIPModel):
    """transformers.CLIPModel whose loss never makes the N x N logits."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: object,
    ) -> CLIPOutput:
        """transformers.CLIPModel.forward; with return_loss=True the logits are None."""
        inputs = _inputs(input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding)
        if not return_loss:
            return super().forward(**inputs, return_dict=True, **kwargs)
        outputs = _embed(self, **inputs, **kwargs)
        image, text = outputs["image_embeds"], outputs["text_embeds"]
        loss = clip_loss(image.to(text.device), text, self.logit_scale.exp(), normalize=False)
        return CLIPOutput(loss=loss, **outputs)


class SiglipModel(transformers.SiglipModel):
    """transformers.SiglipModel whose loss never makes the N x N logits."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: object,
    ) -> SiglipOutput:
        """transformers.SiglipModel.forward; with return_loss=True the logits are None."""
        inputs = _inputs(input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding)
        if not return_loss:
            return super().forward(**inputs, return_dict=True, **kwargs)
        outputs = _embed(self, **inputs, **kwargs)
        image, text = outputs["image_embeds"], outputs["text_embeds"]
        loss = siglip_loss(image.to(text.device), text, self.logit_scale.exp(), self.logit_bias, normalize=False)
        return SiglipOutput(loss=loss, **outputs)


_OURS = {transformers.CLIPModel: CLIPModel, transformers.SiglipModel: SiglipModel}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def patch(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Turn a CLIPModel or SiglipModel into the class above, in place; returns the same model.

    Calling it again changes nothing. Raises TypeError for any other class, subclasses included.
    """
    if type(model) in _THEIRS:
        return model
    if type(model) not in _OURS:
        raise TypeError(f"model must be a transformers CLIPModel or SiglipModel, got {type(model).__name__}")
    model.__class__ = _OURS[type(model)]
    return model


def unpatch(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Give a model its Hugging Face class back, in place; returns the same model. Any other model stays as it is."""
    model.__class__ = _THEIRS.get(type(model), type(model))
    return model


def _inputs(input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding) -> dict[str, object]:
    return {
        "input_ids": input_ids,
        "pixel_values": pixel_values,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "interpolate_pos_encoding": interpolate_pos_encoding,
    }


def _embed(
    model, input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding, **kwargs
) -> dict[str, object]:
    """Both towers: what CLIPOutput and SiglipOutput hold besides the loss and the logits."""
    vision = model.get_image_features(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
    )
    text = model.get_text_features(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
    )
    image_embeds, text_embeds = vision.pooler_output, text.pooler_output
    return {
        # Not F.normalize: Hugging Face's own quotient, without an epsilon.
        "image_embeds": image_embeds / image_embeds.norm(dim=-1, keepdim=True),
        "text_embeds": text_embeds / text_embeds.norm(dim=-1, keepdim=True),
        "text_model_output": text,
        "vision_model_output": vision,
    }
