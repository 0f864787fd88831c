#!/usr/bin/env python
"""From a picture and a question to one optimiser step and a saved adapter, without a trainer.

    python examples/one_step.py --language HuggingFaceTB/SmolLM2-135M-Instruct --vision facebook/dinov2-small \
        --picture cat.jpg --question "What is shown?" --answer "A cat." --output runs/one_step

Read it from top to bottom: every stage of `mm-moslora train` is here once, for one conversation on one device in fp32.
The two losses that it prints are those of the first two steps of a run over this one conversation in fp32, without
dropout and warm-up.
"""

import argparse

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

from mm_moslora.adapters import save_adapter
from mm_moslora.config import AdapterConfig, ModelConfig, OptimConfig, VisionConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.parameter_groups import parameter_groups

arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
arguments.add_argument("--language", required=True, help="hub id or folder of a language model")
arguments.add_argument("--vision", required=True, help="hub id or folder of a vision tower")
arguments.add_argument("--picture", required=True, help="picture file")
arguments.add_argument("--question", required=True, help="question about the picture")
arguments.add_argument("--answer", required=True, help="answer to learn")
arguments.add_argument("--output", required=True, help="folder for adapter and projector")
arguments.add_argument("--rank", type=int, default=16, help="rank of the adapter")
given = arguments.parse_args()

# 1. The model: a tower and a language model, both frozen, and a new projector between them. Towers are asked for their
# grid and width, so any pair fits. The projector's weights are random: the seed decides them.
torch.manual_seed(0)
config = ModelConfig(language=given.language, vision=VisionConfig(name=given.vision))
parts = load_parts(config)
model = parts.model

# 2. MoSLoRA in every linear layer of the decoder: y = W0 x + s B M A x, with a learned r x r mixer M. B begins at zero,
# so the model is unchanged before the first step. Rank and alpha are the paper's, as is the orthogonal start of M.
attach_adapters(parts, config, AdapterConfig(rank=given.rank, alpha=2 * given.rank, dropout=0.0))
model.train()

# 3. The picture: pixels for the tower, and the number of visual tokens that it will take up in the conversation.
processing = parts.image_processing
assert processing is not None
(picture,) = processing.process([Image.open(given.picture).convert("RGB")])
pixels = picture.tensors["pixel_values"]  # [1, 3, H, W]

# 4. The conversation: the chat template's markers, the texts, one placeholder per visual token. The encoder knows from
# where each token came, so the labels need no search: the answer and its end of turn are supervised, nothing else.
turns = [Turn.asking(given.question, images=1), Turn(role="assistant", text=given.answer)]
encoded = ConversationEncoder.of(parts).encode(turns, pictures=[picture.placeholders])
ids, supervised = encoded.input_ids, encoded.supervised  # [T], [T]

# 5. The optimiser. Adapter, mixer and projector may have rates of their own; biases and norms never decay.
groups = parameter_groups(model, OptimConfig(lr=2e-4, projector_lr=1e-3))
optimizer = torch.optim.AdamW(
    [{"params": list(group.parameters), "lr": group.peak_lr, "weight_decay": group.weight_decay} for group in groups],
    betas=(0.9, 0.999),
)
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

losses = []
for _ in range(2):
    # 6. Forward. The frozen tower needs no graph; its features go through the projector and take the places of the
    # placeholders among the word embeddings.
    embeddings = model.get_input_embeddings()(ids)  # [T, D]
    visual = model.model.get_image_features(pixels).pooler_output  # one [Q, D] per picture
    embeddings = embeddings.masked_scatter((ids == parts.image_token_id)[:, None], torch.cat(list(visual)))
    hidden = model.model.language_model(inputs_embeds=embeddings[None]).last_hidden_state[0]  # [T, D]

    # 7. The loss: position t predicts token t + 1. Only positions before a supervised token go through the head, which
    # is the largest product of a small model. `train` divides by the supervised tokens of all ranks and micro-batches.
    predicts = supervised[1:].nonzero().flatten()  # [K]
    logits = model.get_output_embeddings()(hidden[predicts])  # [K, C]
    loss = cross_entropy(logits, ids[1:][predicts])
    losses.append(loss.item())
    if len(losses) == 2:  # what the step has changed
        break

    # 8. Backward, and the optimiser step. Clipping uses the norm over all groups together.
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()

# 9. Save. `load_adapter` and stock PEFT both read the folder: M stays apart in one form, and is folded into B in the
# other. The projector is new, so it is saved, too.
save_adapter(model, f"{given.output}/adapter", base=parts.base)
save_file(model.model.multi_modal_projector.state_dict(), f"{given.output}/projector.safetensors")
print(f"loss {losses[0]:.6f} -> {losses[1]:.6f}; {len(ids)} tokens, {int(supervised.sum())} supervised")
