"""One adapter in tunemesh and in transformers + peft, both ways: adapter.py MODEL ADAPTER -> JSON lines.

1. ADAPTER, as tunemesh delivered it, loads with PeftModel.from_pretrained: difference of the logits.
2. peft saves an adapter of the same shape with other numbers; tunemesh loads it: the same difference.
Run from the project's top after `npm run build`. Exits with 1 where a difference is above the limit.
"""
import json, subprocess, sys, tempfile, warnings
from pathlib import Path

import numpy, torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

LIMIT = 1e-4  # as in the golden runs
model_folder, adapter_folder = sys.argv[1:3]
warnings.simplefilter("error")  # peft warns of keys that it misses or does not know


def base():
    return AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32).eval()


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].numpy()


def ours(adapter):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "logits")
        text = " ".join(map(str, ids.tolist()))
        subprocess.run(["node", "build/bench/adapter-logits.js", model_folder, adapter, text, out], check=True)
        return numpy.fromfile(out, dtype=numpy.float32)


def compare(what, peft_model, adapter):
    theirs = logits_of(peft_model)
    found = ours(adapter).reshape(theirs.shape)
    difference = float(abs(theirs - found).max())
    moved = float(abs(theirs - untuned).max())
    print(json.dumps({"what": what, "max_abs_difference": difference, "adapter_moves_by": moved,
                      "max_abs_logit": float(abs(theirs).max()), "same_argmax":
                      bool((theirs.argmax(-1) == found.argmax(-1)).all())}))
    return difference <= LIMIT < moved


torch.manual_seed(7)
untuned_model = base()
ids = torch.randint(0, untuned_model.config.vocab_size, (48,))
untuned = logits_of(untuned_model)
is_good = compare("tunemesh's adapter in peft", PeftModel.from_pretrained(base(), adapter_folder).eval(),
                  adapter_folder)

told = json.loads(Path(adapter_folder, "adapter_config.json").read_text())
config = LoraConfig(r=told["r"], lora_alpha=told["lora_alpha"], target_modules=told["target_modules"],
                    use_rslora=told.get("use_rslora", False), task_type="CAUSAL_LM")
model = get_peft_model(base(), config).eval()
for name, parameter in model.named_parameters():
    if "lora_" in name:
        parameter.data.normal_(std=0.05)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    is_good &= compare("peft's adapter in tunemesh", model, folder)
sys.exit(0 if is_good else 1)
