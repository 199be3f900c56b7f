"""Training steps of small Llamas in transformers and peft on one GPU, a plain loop with clipping and fused AdamW:
small_step.py smollm2-135m|tiny-5m lora|full BATCH SEQ bfloat16|float32 -> one JSON line."""
import json
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import torch
from transformers import LlamaConfig, LlamaForCausalLM

name, method, batch, seq, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), getattr(torch, sys.argv[5])
shape = {
    "smollm2-135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3),
    "tiny-5m": dict(vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=5,
                    num_attention_heads=4, num_key_value_heads=2),
}[name]
model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True, use_cache=False,
                                     **shape)).to("cuda", dtype)
if method == "lora":
    from peft import LoraConfig, get_peft_model

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=linears)
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
ids = torch.randint(0, shape["vocab_size"], (batch, seq), device="cuda")


def step():
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


for _ in range(8):
    step()
seconds = []
for _ in range(20):
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
median = sorted(seconds)[10]
print(json.dumps({"peer": "transformers, plain loop", "ms": median * 1e3, "tokens_per_second": batch * seq / median,
                  "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
