#include "engine/adapter_folder.h"

#include <string_view>

#include "engine/json.h"
#include "engine/safetensors.h"
#include "engine/tensor_files.h"

namespace tunemesh {
namespace {

constexpr const char* kCode = "ADAPTER_INVALID";

[[noreturn]] void fail(const std::string& folder, const std::string& what) {
  throw EngineError(kCode, folder + ": " + what);
}

void refuse_variant(const std::string& path, const JsonObject& config) {
  for (const char* switch_name : {"use_dora", "use_qalora", "lora_bias", "fan_in_fan_out"}) {
    const auto found = config.find(switch_name);
    if (found != config.end() && found->second.is_bool(true)) {
      fail(path, std::string(switch_name) + " is true; only plain LoRA is read.");
    }
  }
  const auto bias = config.find("bias");
  if (bias != config.end() && bias->second.string("bias") != "none") {
    fail(path, "bias is " + bias->second.string("bias") + "; only \"none\" is read.");
  }
  for (const char* pattern : {"rank_pattern", "alpha_pattern"}) {
    const auto found = config.find(pattern);
    if (found == config.end() || !found->second.is_object()) continue;
    if (!found->second.object(pattern).empty()) {
      fail(path,
           std::string(pattern) + " is not empty; one rank and alpha for all modules is read.");
    }
  }
}

}  // namespace

LoraSpec read_adapter_spec(const std::string& folder) {
  const std::string path = folder + "/adapter_config.json";
  const MappedFile file(path, kCode);
  if (file.size() > kMaxSafetensorsHeaderBytes) fail(path, "is larger than any configuration.");
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  const Json json = parse_json({text, path, kCode});
  const JsonObject& config = json.object(path);
  auto field = [&](const char* name) -> const Json& {
    const auto found = config.find(name);
    if (found == config.end()) fail(path, std::string(name) + " is missing.");
    return found->second;
  };
  if (field("peft_type").string("peft_type") != "LORA") {
    fail(path, "peft_type is " + field("peft_type").string("peft_type") + "; only LORA is read.");
  }
  refuse_variant(path, config);
  LoraSpec lora;
  lora.rank = field("r").count(path + ": r");
  lora.alpha = field("lora_alpha").number(path + ": lora_alpha");
  const auto rslora = config.find("use_rslora");
  lora.use_rslora = rslora != config.end() && rslora->second.is_bool(true);
  const Json& targets = field("target_modules");
  if (targets.is_string()) {
    if (targets.string("target_modules") != "all-linear") {
      fail(path, "target_modules is a pattern; a list of module names is read.");
    }
    lora.target_modules = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                           "gate_proj", "up_proj", "down_proj"};
    return lora;
  }
  for (const Json& module : targets.array(path + ": target_modules")) {
    lora.target_modules.push_back(module.string(path + ": target_modules"));
  }
  return lora;
}

void read_adapter_weights(const Device& device, const std::string& folder,
                          const TrainedVector& trained) {
  const SafetensorsFile file(folder + "/adapter_model.safetensors", kCode);
  for (const auto& [name, tensor] : file.tensors()) {
    if (trained.layout->find(name) == nullptr) {
      fail(file.path(), "tensor " + name + " has no place among the job's adapters.");
    }
  }
  read_tensors(device, {file, trained, StateKind::kWeight, ""});
}

void write_adapter_folder(const Device& device, const AdapterOutput& output) {
  const LoraSpec& lora = output.lora;
  std::string modules;
  for (const std::string& module : lora.target_modules) {
    modules += (modules.empty() ? "" : ", ") + json_quote(module);
  }
  char alpha[32];
  std::snprintf(alpha, sizeof alpha, "%.17g", lora.alpha);
  const std::string config =
      "{\n  \"base_model_name_or_path\": " + json_quote(output.base_model_name) +
      ",\n  \"bias\": \"none\",\n  \"fan_in_fan_out\": false,\n  \"inference_mode\": true,\n"
      "  \"init_lora_weights\": true,\n  \"lora_alpha\": " +
      alpha + ",\n  \"lora_dropout\": 0.0,\n  \"modules_to_save\": null,\n" +
      "  \"peft_type\": \"LORA\",\n  \"r\": " + std::to_string(lora.rank) +
      ",\n  \"target_modules\": [" + modules +
      "],\n  \"task_type\": \"CAUSAL_LM\",\n  \"use_dora\": false,\n  \"use_rslora\": " +
      (lora.use_rslora ? "true" : "false") + "\n}\n";
  SafetensorsContent content;
  content.metadata = {{"format", "pt"}};
  add_entries(device, {output.trained, StateKind::kWeight, ""}, content);
  write_safetensors(output.folder + "/adapter_model.safetensors", content);
  FileWriter file(output.folder + "/adapter_config.json");
  file.write(config.data(), config.size());
  file.commit();
}

}  // namespace tunemesh
