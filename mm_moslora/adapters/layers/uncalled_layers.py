"""Layers that are not called, because the module around them reads their weight; an adapter there has no effect."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_MASK_DECODER = ("iou_token", "mask_tokens", "obj_score_token")

NEVER_CALLED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer", "JambaMambaMixer"), ("dt_proj",)),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    **dict.fromkeys(
        ("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap"), ("k_proj",)
    ),
    "DabDetrMHAttentionMap": ("k_linear",),
    "TDNNLayer": ("kernel",),
    "MobileBertLMPredictionHead": ("dense",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "LongcatFlashTopkRouter": ("classifier",),
    # Embeddings that are tables of queries and positions.
    **dict.fromkeys(
        ("AudioFlamingo3Encoder", "MossTranscribeDiarizeAudioModel", "Qwen2AudioEncoder"), ("embed_positions",)
    ),
    "VoxtralEncoder": ("embed_positions",),
    **dict.fromkeys(("DebertaEncoder", "DebertaV2Encoder", "SEWDTransformerEncoder"), ("rel_embeddings",)),
    **dict.fromkeys(
        ("Glm4vVisionEmbeddings", "Glm4vMoeVisionEmbeddings", "GlmImageVisionEmbeddings"), ("position_embedding",)
    ),
    **dict.fromkeys(("HunYuanVLVisionPatchEmbed", "HYV4VLVisionPatchEmbed"), ("position_embedding",)),
    **dict.fromkeys(("Emu3VQVAEVectorQuantizer", "GlmImageVQVAEVectorQuantizer"), ("embedding",)),
    **dict.fromkeys(
        ("DeformableDetrModel", "GroundingDinoModel", "MMGroundingDinoModel"), ("query_position_embeddings",)
    ),
    **dict.fromkeys(("LwDetrModel", "RfDetrModel"), ("reference_point_embed", "query_feat")),
    **dict.fromkeys(("Mask2FormerTransformerModule", "OneFormerTransformerModule"), ("level_embed",)),
    **dict.fromkeys(("EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation"), ("query",)),
    "VideomtForUniversalSegmentation": ("query",),
    "DabDetrModel": ("patterns",),
    "DeepseekOcr2VisionModel": ("query_768_resolution", "query_1024_resolution"),
    "ProphetNetDecoder": ("ngram_embeddings",),
    "SamMaskDecoder": ("iou_token", "mask_tokens"),
    "SamHQMaskDecoder": ("iou_token", "mask_tokens", "hq_token"),
    **dict.fromkeys(("Sam2MaskDecoder", "Sam2VideoMaskDecoder", "EdgeTamMaskDecoder"), _MASK_DECODER),
    **dict.fromkeys(
        ("EdgeTamVideoMaskDecoder", "Sam3TrackerMaskDecoder", "Sam3TrackerVideoMaskDecoder"), _MASK_DECODER
    ),
    **dict.fromkeys(("SamPromptEncoder", "SamHQPromptEncoder", "Sam2PromptEncoder"), ("not_a_point_embed",)),
    **dict.fromkeys(("Sam2VideoPromptEncoder", "EdgeTamPromptEncoder"), ("not_a_point_embed",)),
    **dict.fromkeys(("EdgeTamVideoPromptEncoder", "Sam3TrackerPromptEncoder"), ("not_a_point_embed",)),
    "Sam3TrackerVideoPromptEncoder": ("not_a_point_embed",),
}
"""Children that are not called but read, by the name of the parent's class; torch's MultiheadAttention reads any."""

SOMETIMES_CALLED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("MambaMixer", "FalconMambaMixer"), ("x_proj", "out_proj")),
    **dict.fromkeys(("Mamba2Mixer", "NemotronHMamba2Mixer", "BambaMixer", "FalconH1Mixer"), ("out_proj",)),
    **dict.fromkeys(("Zamba2MambaMixer", "GraniteMoeHybridMambaLayer"), ("out_proj",)),
    **dict.fromkeys(("Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"), ("lm_head",)),
    "DiffusionGemmaDecoderModel": ("embed_tokens",),
}
"""Children that one code path calls, while another passes their weight to a function (mostly a fused kernel)."""


def why_not_called(parent: nn.Module | None, name: str) -> str | None:
    """Why an adapter on a child of a module would have no effect on all or some code paths; None if it has.

    Args:
        parent: the module that holds the layer.
        name: of the layer in it.
    """
    for kind in type(parent).__mro__:
        if kind is nn.MultiheadAttention or name in NEVER_CALLED.get(kind.__name__, ()):
            does = "reads this layer's weight and never calls it"
        elif name in SOMETIMES_CALLED.get(kind.__name__, ()):
            does = "hands this layer's weight to a function where it can, and does not call the layer then"
        else:
            continue
        return (
            f"{kind.__module__}.{kind.__name__} {does}, so an adapter here would do nothing in training and change the "
            "model when it is merged. Choose other targets, or leave it out (exclude_modules)."
        )
    return None
