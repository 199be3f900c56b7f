"""One adapter in tunemesh and in transformers + peft, both ways -> JSON lines.

    adapter.py MODEL ADAPTER [--device cuda:0] [--precision bf16]

1. ADAPTER, as tunemesh delivered it, loads with PeftModel.from_pretrained, every tensor and no other: difference of logits.
2. peft saves an adapter of the same shape with other numbers; tunemesh loads it: the same difference.
The peers compute on the same kind of device, in float32. In bf16 tunemesh may be off by twice what torch is when model and
adapter are bf16 there too (both as relative errors against float32). Needs a build, or lies in the bundle.
Exits with 1 where a difference is above the limit.
"""
import argparse, json, subprocess, sys, tempfile, warnings
from pathlib import Path

import numpy, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

options = argparse.ArgumentParser()
options.add_argument("model")
options.add_argument("adapter")
options.add_argument("--device", default="cpu")
options.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
options.add_argument("--fp32-limit", type=float, default=1e-4, help="largest difference; the golden runs': 1e-4, of a real model 2e-3")
asked = options.parse_args()
top = Path(__file__).resolve().parents[2]
node = str(top.parent / "node") if (top.parent / "node").exists() else "node"  # the bundle brings its own
torch_device = asked.device if asked.device.startswith("cuda") else "cpu"
# Its name changed in transformers 4.56.
dtype_name = "dtype" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 56) else "torch_dtype"


def base(dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(asked.model, **{dtype_name: dtype})
    return model.eval().to(torch_device)


def with_adapter(dtype=torch.float32):
    """peft warns of keys that it misses or does not know; what it holds is compared with the file besides."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base(dtype), asked.adapter, autocast_adapter_dtype=dtype == torch.float32).eval()
    about_keys = [str(w.message) for w in told if "key" in str(w.message).lower()]
    held = get_peft_model_state_dict(model)
    file = load_file(Path(asked.adapter, "adapter_model.safetensors"))
    is_same = held.keys() == file.keys() and all(torch.equal(held[name].cpu(), file[name].to(held[name].dtype)) for name in file)
    if about_keys or not is_same:
        sys.exit(f"peft holds {len(held)} tensors, the file {len(file)}: {about_keys or 'they differ'}")
    return model


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=ids[None].to(torch_device)).logits[0].float().cpu().numpy()


def ours(adapter):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "logits")
        program = [node, str(top / "build/bench/adapter-logits.js")]
        text = " ".join(map(str, ids.tolist()))
        how = ["--device", asked.device, "--precision", asked.precision]
        subprocess.run([*program, asked.model, str(adapter), text, str(out), *how], check=True)
        return numpy.fromfile(out, dtype=numpy.float32)


def relative(values, reference):
    return float(numpy.linalg.norm(values - reference) / numpy.linalg.norm(reference))


def compare(what, peft_model, adapter, peft_half=None):
    theirs = logits_of(peft_model)
    found = ours(adapter).reshape(theirs.shape)
    told = {
        "what": what,
        "device": asked.device,
        "precision": asked.precision,
        "max_abs_difference": float(abs(theirs - found).max()),
        "relative_error": relative(found, theirs),
        "adapter_moves_by": float(abs(theirs - untuned).max()),
        "max_abs_logit": float(abs(theirs).max()),
        "same_argmax": f"{int((theirs.argmax(-1) == found.argmax(-1)).sum())} of {len(theirs)}",
    }
    is_good = told["max_abs_difference"] <= asked.fp32_limit
    if peft_half is not None:
        told["torch_bf16_relative_error"] = relative(logits_of(peft_half), theirs)
        is_good = told["relative_error"] <= 2 * told["torch_bf16_relative_error"]
    told["is_good"] = bool(is_good and told["adapter_moves_by"] > asked.fp32_limit)
    print(json.dumps(told), flush=True)
    return told["is_good"]


is_half = asked.precision == "bf16"
torch.manual_seed(7)
untuned_model = base()
ids = torch.randint(0, untuned_model.config.vocab_size, (48,))
untuned = logits_of(untuned_model)
half = with_adapter(torch.bfloat16) if is_half else None
is_good = compare("tunemesh's adapter in peft", with_adapter(), asked.adapter, half)

told = json.loads(Path(asked.adapter, "adapter_config.json").read_text())
config = LoraConfig(r=told["r"], lora_alpha=told["lora_alpha"], target_modules=told["target_modules"],
                    use_rslora=told.get("use_rslora", False), task_type="CAUSAL_LM")


def fresh(dtype=torch.float32):
    torch.manual_seed(8)
    model = get_peft_model(base(dtype), config, autocast_adapter_dtype=dtype == torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape))  # the same numbers on each device
    return model


model = fresh()
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    is_good &= compare("peft's adapter in tunemesh", model, folder, fresh(torch.bfloat16) if is_half else None)
sys.exit(0 if is_good else 1)
