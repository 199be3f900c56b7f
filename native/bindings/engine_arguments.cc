#include "bindings/engine_arguments.h"

#include <cmath>
#include <cstdlib>

#include "engine/backend_plugin.h"

namespace tunemesh {
namespace {

[[noreturn]] void refuse(const Napi::Env& env, const char* name, const char* wanted) {
  throw Napi::TypeError::New(env, std::string(name) + " must be " + wanted);
}

size_t count_field(const Napi::Object& from, const char* name) {
  return count_value(from.Get(name), name);
}

std::string text_field(const Napi::Object& from, const char* name) {
  return text_value(from.Get(name), name);
}

bool flag_field(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsBoolean()) refuse(from.Env(), name, "a boolean");
  return value.As<Napi::Boolean>().Value();
}

Napi::Object object_field(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsObject()) refuse(from.Env(), name, "an object");
  return value.As<Napi::Object>();
}

std::vector<int32_t> int32_field(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_int32_array) {
    refuse(from.Env(), name, "an Int32Array");
  }
  const auto array = value.As<Napi::Int32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

RotaryScaling rotary_scaling(const Napi::Object& from) {
  RotaryScaling scaling;
  const std::string kind = text_field(from, "kind");
  if (kind == "none") return scaling;
  scaling.factor = number_field(from, "factor");
  if (kind == "linear") {
    scaling.kind = RotaryScaling::Kind::kLinear;
    return scaling;
  }
  if (kind != "llama3") refuse(from.Env(), "rotaryScaling.kind", "none, linear or llama3");
  scaling.kind = RotaryScaling::Kind::kLlama3;
  scaling.low_freq_factor = number_field(from, "lowFreqFactor");
  scaling.high_freq_factor = number_field(from, "highFreqFactor");
  scaling.original_max_position = number_field(from, "originalMaxPosition");
  return scaling;
}

ModelConfig model_config(const Napi::Object& from) {
  ModelConfig config;
  config.family = text_field(from, "family");
  config.vocab_size = count_field(from, "vocabSize");
  config.hidden_size = count_field(from, "hiddenSize");
  config.intermediate_size = count_field(from, "intermediateSize");
  config.num_layers = count_field(from, "numLayers");
  config.num_heads = count_field(from, "numHeads");
  config.num_kv_heads = count_field(from, "numKvHeads");
  config.head_size = count_field(from, "headSize");
  config.max_position_embeddings = count_field(from, "maxPositionEmbeddings");
  config.rms_norm_epsilon = number_field(from, "rmsNormEpsilon");
  config.rotary_theta = number_field(from, "rotaryTheta");
  config.rotary_scaling = rotary_scaling(object_field(from, "rotaryScaling"));
  config.sliding_window = count_field(from, "slidingWindow");
  config.qkv_bias = flag_field(from, "qkvBias");
  config.qk_norm = flag_field(from, "qkNorm");
  config.tie_word_embeddings = flag_field(from, "tieWordEmbeddings");
  return config;
}

LoraSpec lora_spec(const Napi::Object& from) {
  LoraSpec lora;
  lora.rank = count_field(from, "loraRank");
  lora.alpha = number_field(from, "alpha");
  lora.use_rslora = flag_field(from, "useRslora");
  const Napi::Value modules = from.Get("targetModules");
  if (!modules.IsArray()) refuse(from.Env(), "targetModules", "an array");
  const auto array = modules.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); ++i) {
    lora.target_modules.push_back(text_value(array.Get(i), "targetModules"));
  }
  return lora;
}

// true, false or "auto".
Use use_field(const Napi::Object& from, const char* name) {
  if (!from.Get(name).IsBoolean()) {
    if (text_field(from, name) != "auto") refuse(from.Env(), name, "true, false or \"auto\"");
    return Use::kAuto;
  }
  return flag_field(from, name) ? Use::kAlways : Use::kNever;
}

int significant_bits(const Napi::Object& from) {
  const std::string codec = text_field(from, "codec");
  if (codec == "q24") return 24;
  if (codec == "q12") return 12;
  if (codec == "q8") return 8;
  refuse(from.Env(), "codec", "q24, q12 or q8");
}

}  // namespace

double number_field(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsNumber()) refuse(from.Env(), name, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

size_t count_value(const Napi::Value& value, const char* name) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : -1;
  if (!(number >= 0 && number <= 0x1p53) || number != std::floor(number)) {
    refuse(value.Env(), name, "a whole number from 0");
  }
  return static_cast<size_t>(number);
}

std::string text_value(const Napi::Value& value, const char* name) {
  if (!value.IsString()) refuse(value.Env(), name, "a string");
  return value.As<Napi::String>().Utf8Value();
}

// "cpu", or "cuda:0" and so on.
ChosenDevice chosen_device(const Napi::Object& from) {
  ChosenDevice chosen;
  const std::string device = text_field(from, "device");
  const size_t colon = device.find(':');
  std::string plugin;
  if (colon != std::string::npos) {
    chosen.options.device_index = std::atoi(device.c_str() + colon + 1);
    plugin = text_field(from, "pluginPath");
  }
  chosen.backend = find_backend(device.substr(0, colon), plugin);
  chosen.options.num_threads = static_cast<int>(count_field(from, "numThreads"));
  chosen.options.instruction_path = text_field(from, "instructionPath");
  const std::string precision = text_field(from, "precision");
  chosen.options.precision = precision == "fp8" ? TM_FP8 : precision == "bf16" ? TM_BF16 : TM_FP32;
  chosen.options.library_folder = text_field(from, "libraryFolder");
  chosen.options.records_calls = flag_field(from, "recordsCalls");
  chosen.options.is_deterministic = flag_field(from, "isDeterministic");
  return chosen;
}

EngineOptions engine_options(const Napi::Object& from) {
  EngineOptions options;
  options.model_path = text_field(from, "modelPath");
  options.config = model_config(object_field(from, "config"));
  const Napi::Value cache = from.Get("packedCacheDir");
  if (!cache.IsNull() && !cache.IsUndefined()) {
    options.packed_cache_dir = text_value(cache, "packedCacheDir");
    if (from.Has("packedCacheBytes")) {
      options.packed_cache_limits.max_bytes =
          static_cast<uintmax_t>(number_field(from, "packedCacheBytes"));
    }
  }
  return options;
}

TrainSpec train_spec(const Napi::Object& from) {
  TrainSpec spec;
  spec.is_full = text_field(from, "finetuning") == "full";
  if (!spec.is_full) spec.lora = lora_spec(object_field(from, "lora"));
  const std::string states = text_field(from, "states");
  spec.has_byte_moments = spec.is_full && states == "bf16_8bit";
  spec.has_half_states = spec.has_byte_moments || (spec.is_full && states == "bf16");
  spec.seed = count_field(from, "seed");
  spec.tokens_per_micro_batch = count_field(from, "tokensPerMicroBatch");
  spec.longest_document = count_field(from, "longestDocument");
  spec.loss_chunk_rows = count_field(from, "lossChunkRows");
  spec.gradient_checkpointing = use_field(from, "gradientCheckpointing");
  spec.activation_offloading = use_field(from, "activationOffloading");
  spec.significant_bits = significant_bits(from);
  spec.beta1 = number_field(from, "beta1");
  spec.beta2 = number_field(from, "beta2");
  spec.epsilon = static_cast<float>(number_field(from, "epsilon"));
  spec.weight_decay = static_cast<float>(number_field(from, "weightDecay"));
  spec.num_contribution_slots = static_cast<int>(count_field(from, "numContributionSlots"));
  spec.slice_blocks = count_field(from, "sliceBlocks");
  spec.chunk_blocks = count_field(from, "chunkBlocks");
  return spec;
}

GenerateOptions generate_options(const Napi::Object& from) {
  GenerateOptions options;
  options.prompt = int32_field(from, "promptIds");
  options.max_new_tokens = count_field(from, "maxNewTokens");
  options.temperature = static_cast<float>(number_field(from, "temperature"));
  options.top_p = static_cast<float>(number_field(from, "topP"));
  const Napi::Value seed = from.Get("seed");
  if (!seed.IsBigInt()) refuse(from.Env(), "seed", "a bigint");
  bool lossless = false;
  options.seed = seed.As<Napi::BigInt>().Uint64Value(&lossless);
  const Napi::Value stops = from.Get("stopIds");
  if (!stops.IsArray()) refuse(from.Env(), "stopIds", "an array");
  const auto array = stops.As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); ++i) {
    options.stop_ids.push_back(static_cast<int32_t>(count_value(array.Get(i), "stopIds")));
  }
  return options;
}

TokenBatch OwnedBatch::view() const {
  return {tokens.data(), targets.data(), tokens.size(), document_starts.data(),
          document_starts.empty() ? 0 : document_starts.size() - 1};
}

OwnedBatch token_batch(const Napi::Object& from) {
  OwnedBatch batch = {int32_field(from, "tokens"), int32_field(from, "targets"),
                      int32_field(from, "documentStarts")};
  if (batch.targets.size() != batch.tokens.size()) {
    refuse(from.Env(), "targets", "as long as tokens");
  }
  if (batch.document_starts.empty()) refuse(from.Env(), "documentStarts", "at least one number");
  return batch;
}

}  // namespace tunemesh
