#!/usr/bin/env python
"""MoSLoRA in a plain PyTorch loop: a causal language model of transformers learns the lines of a text file.

    python examples/own_loop.py HuggingFaceTB/SmolLM2-135M-Instruct lines.txt runs/own_loop

Nothing but the two marked lines differs from a loop without adapters.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter

arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
arguments.add_argument("model", help="hub id or folder of a causal language model")
arguments.add_argument("text", type=Path, help="UTF-8 text file; each line is one sample")
arguments.add_argument("output", type=Path, help="folder of the adapter")
arguments.add_argument("--epochs", type=int, default=3, help="passes over the file")
arguments.add_argument("--lr", type=float, default=1e-3, help="learning rate")
given = arguments.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(given.model, trust_remote_code=False)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(given.model, trust_remote_code=False, dtype=torch.float32).to(device)
model = add_moslora(model, MoSLoRAConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))  # <- the adapter
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=given.lr, weight_decay=0.0)
lines = [line + tokenizer.eos_token for line in given.text.read_text(encoding="utf-8").splitlines() if line.strip()]

model.train()
for epoch in range(given.epochs):
    total = count = 0.0
    for texts in DataLoader(lines, batch_size=8, shuffle=True):
        batch = tokenizer(list(texts), return_tensors="pt", padding=True).to(device)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total, count = total + loss.item(), count + 1
    print(f"epoch {epoch + 1}: loss {total / count:.4f}")

save_adapter(model, given.output)  # <- read by load_adapter and by stock PEFT

# The adapter on a fresh base, merged for use without this package.
base = AutoModelForCausalLM.from_pretrained(given.model, trust_remote_code=False, dtype=torch.float32).to(device)
merged = merge(load_adapter(base, given.output)).eval()
prompt = tokenizer(lines[0][: len(lines[0]) // 2], return_tensors="pt").to(device)
answer = merged.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
