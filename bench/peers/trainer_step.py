"""Training steps of transformers' Trainer (and peft) on one GPU, random weights of a Llama's shape, full-length random tokens:
trainer_step.py llama-8b|llama-3b|llama-1b|qwen2.5-7b lora|full BATCH SEQ plain|compile|liger|checkpoint -> one JSON line.
Several with + between them: liger+checkpoint. liger needs liger-kernel, installed or on PYTHONPATH."""
import json
import os
import sys
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers import Trainer, TrainerCallback, TrainingArguments

name, method, batch, seq, variant = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
variants = variant.split("+")
STEPS, WARM = 14, 5
SHAPES = {
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                     num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
    "llama-3b": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28,
                     num_attention_heads=24, num_key_value_heads=8, tie_word_embeddings=True),
    "llama-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                     num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, vocab_size=152064,
                       num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False),
}
is_qwen = name.startswith("qwen")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
if "liger" in variants:
    from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_qwen2

    apply_liger_kernel_to_qwen2() if is_qwen else apply_liger_kernel_to_llama()

shape = dict(vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
             rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
config = (Qwen2Config if is_qwen else LlamaConfig)(**{**shape, **SHAPES[name]})
config._attn_implementation = "sdpa"
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = (Qwen2ForCausalLM if is_qwen else LlamaForCausalLM)(config)
torch.set_default_dtype(torch.float32)
model = model.to(torch.bfloat16)
model.config.use_cache = False
if method == "lora":
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, task_type="CAUSAL_LM",
                                             target_modules=LINEARS))
    if "checkpoint" in variants:
        model.enable_input_require_grads()


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 100000

    def __getitem__(self, index):
        ids = torch.randint(0, 128000, (seq,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(seq, dtype=torch.long)}


class Timer(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            torch.cuda.synchronize()
            self.seconds = (time.perf_counter() - self.start) / (STEPS - WARM)


checkpoints = "checkpoint" in variants
timer = Timer()
arguments = TrainingArguments(
    output_dir="/tmp/trainer-step", max_steps=STEPS, per_device_train_batch_size=batch, learning_rate=2e-5,
    logging_steps=10, save_strategy="no", bf16=True, report_to=[], gradient_checkpointing=checkpoints,
    gradient_checkpointing_kwargs={"use_reentrant": False} if checkpoints else None,
    torch_compile="compile" in variants, dataloader_num_workers=4, disable_tqdm=True)
Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[timer]).train()
print(json.dumps({"peer": f"transformers Trainer, {variant}", "ms": timer.seconds * 1e3,
                  "tokens_per_second": batch * seq / timer.seconds,
                  "peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
