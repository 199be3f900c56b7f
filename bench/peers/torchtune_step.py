"""The body of torchtune 0.6.1's lora_finetune_single_device recipe with compile (same builders, loss, optimiser), random
weights of a Llama's shape, full-length random tokens: torchtune_step.py llama-8b|llama-3b|llama-1b BATCH SEQ -> one JSON line.
torchtune and its wheels (wheels.txt) are installed, or on PYTHONPATH."""
import json
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from torchtune import training
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training.lr_schedulers import get_cosine_schedule_with_warmup

name, batch, seq = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
STEPS, WARM = 14, 5
SHAPES = {  # embed_dim, intermediate_dim, layers, heads, key/value heads, tied
    "llama-1b": (2048, 8192, 16, 32, 8, True),
    "llama-3b": (3072, 8192, 28, 24, 8, True),
    "llama-8b": (4096, 14336, 32, 32, 8, False),
}
embed_dim, intermediate_dim, layers, heads, kv_heads, is_tied = SHAPES[name]
if is_tied:
    from torchtune.models.llama3_2._component_builders import lora_llama3_2 as build
else:
    from torchtune.models.llama3._component_builders import lora_llama3 as build

device = torch.device("cuda")
torch.manual_seed(0)
with training.set_default_dtype(torch.bfloat16), device:
    model = build(lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
                  apply_lora_to_output=False, vocab_size=128256, num_layers=layers, num_heads=heads,
                  num_kv_heads=kv_heads, embed_dim=embed_dim, max_seq_len=8192, intermediate_dim=intermediate_dim,
                  norm_eps=1e-5, lora_rank=16, lora_alpha=32.0, lora_dropout=0.0, rope_base=500000)
for module in model.modules():  # torchtune leaves embeddings to the checkpoint
    if isinstance(module, torch.nn.Embedding):
        torch.nn.init.normal_(module.weight, std=0.02)
set_trainable_params(model, get_adapter_params(model))
loss_of = CEWithChunkedOutputLoss()
training.compile_model(model)
training.compile_loss(loss_of)
model.set_num_output_chunks(loss_of.num_output_chunks)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.01, fused=True)
schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=100)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 100000

    def __getitem__(self, index):
        return torch.randint(0, 128000, (seq,), generator=torch.Generator().manual_seed(index))


rows = iter(torch.utils.data.DataLoader(Rows(), batch_size=batch, num_workers=4, drop_last=True, pin_memory=True))
ignored = torch.full((batch, 1), loss_of.ignore_index, device=device)
torch.cuda.reset_peak_memory_stats()
model.train()
for step in range(STEPS):
    if step == WARM:
        torch.cuda.synchronize()
        start = time.perf_counter()
    tokens = next(rows).to(device, non_blocking=True)
    num_tokens = (tokens != loss_of.ignore_index).sum()
    logits = model(tokens)
    loss = loss_of(logits, torch.hstack((tokens[..., 1:], ignored)))
    del logits
    total = loss * num_tokens
    total.backward()
    training.scale_grads(model, 1 / num_tokens)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    schedule.step()
    total.item()
torch.cuda.synchronize()
seconds = (time.perf_counter() - start) / (STEPS - WARM)
print(json.dumps({"peer": "torchtune, compile", "ms": seconds * 1e3, "tokens_per_second": batch * seq / seconds,
                  "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
