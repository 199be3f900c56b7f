"""The steps of bench/native/step_bench.cc in transformers and peft on the CPU: step.py 5m|135m THREADS -> one JSON line."""
import json, sys, time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

name, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
shapes = {
    "5m": dict(vocab_size=4096, hidden_size=256, intermediate_size=704, num_hidden_layers=5,
               num_attention_heads=4, num_key_value_heads=2),
    "135m": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                 num_attention_heads=9, num_key_value_heads=3),
}
model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, tie_word_embeddings=True,
                                     use_cache=False, **shapes[name]))
rows = 8
if name == "135m":
    from peft import LoraConfig, get_peft_model
    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                                             target_modules=linears))
    rows = 2
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-4)
ids = torch.randint(0, shapes[name]["vocab_size"], (rows, 256))


def step():
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


step()
seconds = []
for _ in range(5):
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
median = sorted(seconds)[2]
print(json.dumps({"ms": median * 1e3, "tokens_per_second": rows * 256 / median}))
