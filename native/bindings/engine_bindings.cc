#include "bindings/engine_bindings.h"

#include <atomic>
#include <memory>

#include "bindings/async_task.h"
#include "bindings/engine_arguments.h"
#include "bindings/exchange_bindings.h"
#include "bindings/method.h"

namespace tunemesh {
namespace {

struct Nothing {};

// What the JavaScript object and its tasks share.
struct EngineHandle {
  std::shared_ptr<TaskQueue> queue;
  std::shared_ptr<Engine> engine;
};
using Handle = std::shared_ptr<EngineHandle>;

// Runs on the engine's thread against the engine, which close() may have taken away meanwhile.
template <class T, class Work>
Napi::Value run(Info info, const Handle& handle,
                std::pair<Work, std::function<Napi::Value(Napi::Env, T&)>> task) {
  auto work = [handle, work = std::move(task.first)]() -> T {
    if (!handle->engine) throw EngineError("ENGINE_FAILED", "the engine is closed.");
    return work(*handle->engine);
  };
  return AsyncTask<T>{handle->queue, std::move(work), std::move(task.second)}.start(info.Env());
}

template <class Work>
Napi::Value run_void(Info info, const Handle& handle, Work work) {
  auto wrapped = [work = std::move(work)](Engine& engine) {
    work(engine);
    return Nothing{};
  };
  std::function<Napi::Value(Napi::Env, Nothing&)> convert = [](Napi::Env env, Nothing&) {
    return env.Undefined();
  };
  return run<Nothing>(info, handle, std::make_pair(std::move(wrapped), std::move(convert)));
}

template <class T, class Work, class Convert>
Napi::Value run_value(Info info, const Handle& handle, std::pair<Work, Convert> task) {
  std::function<Napi::Value(Napi::Env, T&)> convert = std::move(task.second);
  return run<T>(info, handle, std::make_pair(std::move(task.first), std::move(convert)));
}

Napi::Value to_plan(Napi::Env env, const MemoryPlan& plan) {
  auto out = Napi::Object::New(env);
  auto uses = Napi::Array::New(env, plan.uses.size());
  for (uint32_t i = 0; i < plan.uses.size(); ++i) {
    auto use = Napi::Object::New(env);
    use.Set("purpose", plan.uses[i].purpose);
    use.Set("sizeBytes", static_cast<double>(plan.uses[i].size_bytes));
    uses.Set(i, use);
  }
  out.Set("totalBytes", static_cast<double>(plan.total_bytes));
  out.Set("uses", uses);
  auto layers = Napi::Object::New(env);
  const ActivationCounts& counts = plan.activations;
  layers.Set("everything", static_cast<double>(counts.everything));
  layers.Set("products", static_cast<double>(counts.products));
  layers.Set("attentionHalves", static_cast<double>(counts.attention_half));
  layers.Set("inputs", static_cast<double>(counts.input));
  layers.Set("offloaded", static_cast<double>(counts.offloaded));
  layers.Set("embeddingOnHost", plan.embedding_on_host);
  out.Set("layers", layers);
  out.Set("numTrainedParameters", static_cast<double>(plan.num_trained_parameters));
  out.Set("numBlocks", static_cast<double>(plan.num_blocks));
  out.Set("mappedBytes", static_cast<double>(plan.mapped_bytes));
  return out;
}

Napi::Value to_tensors(Napi::Env env, const CanonicalLayout& layout) {
  auto out = Napi::Array::New(env, layout.tensors.size());
  for (uint32_t i = 0; i < layout.tensors.size(); ++i) {
    const TrainedTensor& tensor = layout.tensors[i];
    auto shape = Napi::Array::New(env, tensor.shape.size());
    for (uint32_t j = 0; j < tensor.shape.size(); ++j) {
      shape.Set(j, static_cast<double>(tensor.shape[j]));
    }
    auto entry = Napi::Object::New(env);
    entry.Set("name", tensor.name);
    entry.Set("shape", shape);
    entry.Set("numElements", static_cast<double>(tensor.num_elements));
    entry.Set("firstBlock", static_cast<double>(tensor.first_block));
    out.Set(i, entry);
  }
  return out;
}

Napi::Value to_texts(Napi::Env env, const std::vector<std::string>& texts) {
  auto out = Napi::Array::New(env, texts.size());
  for (uint32_t i = 0; i < texts.size(); ++i) out.Set(i, texts[i]);
  return out;
}

Napi::Value to_micro_batch(Napi::Env env, const MicroBatchResult& result) {
  auto out = Napi::Object::New(env);
  out.Set("lossSum", result.loss_sum);
  out.Set("numTargetTokens", static_cast<double>(result.num_target_tokens));
  out.Set("computeMs", result.compute_ms);
  out.Set("notes", to_texts(env, result.notes));
  return out;
}

Napi::Value to_contribution_slice(Napi::Env env, const ContributionSlice& told) {
  auto out = Napi::Object::New(env);
  out.Set("slice", static_cast<double>(told.slice));
  out.Set("digest", digest_text(told.measure.digest));
  out.Set("packedBytes", static_cast<double>(told.measure.packed_bytes));
  return out;
}

// The vector becomes the array's memory; no copy.
Napi::Value to_float32_array(Napi::Env env, std::vector<float>& values) {
  auto* owned = new std::vector<float>(std::move(values));
  const size_t count = owned->size();
  auto buffer = Napi::ArrayBuffer::New(
      env, owned->data(), count * sizeof(float),
      [](Napi::Env, void*, std::vector<float>* held) { delete held; }, owned);
  return Napi::Float32Array::New(env, count, buffer, 0);
}

Napi::Value to_named_arrays(Napi::Env env, std::vector<TensorValues>& tensors) {
  auto out = Napi::Array::New(env, tensors.size());
  for (uint32_t i = 0; i < tensors.size(); ++i) {
    auto entry = Napi::Object::New(env);
    entry.Set("name", tensors[i].name);
    entry.Set("values", to_float32_array(env, tensors[i].values));
    out.Set(i, entry);
  }
  return out;
}

Napi::Value to_changes(Napi::Env env, const std::vector<WeightChange>& changes) {
  auto out = Napi::Array::New(env, changes.size());
  for (uint32_t i = 0; i < changes.size(); ++i) {
    auto entry = Napi::Object::New(env);
    entry.Set("name", changes[i].name);
    entry.Set("meanAbsChange", changes[i].mean_abs_change);
    out.Set(i, entry);
  }
  return out;
}

void add_life_methods(Napi::Object object, const Handle& handle) {
  set_method(object, "plan", [handle](Info info) {
    if (!handle->engine) throw EngineError("ENGINE_FAILED", "the engine is closed.");
    return to_plan(info.Env(), handle->engine->plan(train_spec(argument_object(info, 0))));
  });
  set_method(object, "load", [handle](Info info) {
    return run_void(info, handle, [](Engine& engine) { engine.load(); });
  });
  set_method(object, "prepare", [handle](Info info) {
    auto work = [spec = train_spec(argument_object(info, 0))](Engine& engine) {
      MemoryPlan memory = engine.prepare(spec);
      return std::make_pair(std::move(memory), engine.exchange());
    };
    using Prepared = std::pair<MemoryPlan, std::shared_ptr<ExchangeBuffers>>;
    auto convert = [handle](Napi::Env env, Prepared& prepared) -> Napi::Value {
      auto out = Napi::Object::New(env);
      out.Set("memory", to_plan(env, prepared.first));
      out.Set("tensors", to_tensors(env, handle->engine->layout()));
      out.Set("exchange", make_exchange_handle(env, prepared.second));
      return out;
    };
    return run_value<Prepared>(info, handle, std::make_pair(work, convert));
  });
  set_method(object, "productRate", [handle](Info info) {
    auto work = [tokens = count_value(info[0], "numTokens")](Engine& engine) {
      return engine.product_rate(tokens);
    };
    auto convert = [](Napi::Env env, ProductRate& rate) -> Napi::Value {
      auto out = Napi::Object::New(env);
      out.Set("flopsPerSecond", rate.flops_per_second);
      out.Set("measuredSeconds", rate.measured_seconds);
      return out;
    };
    return run_value<ProductRate>(info, handle, std::make_pair(work, convert));
  });
  set_method(object, "close", [handle](Info info) -> Napi::Value {
    handle->queue->is_ending() = true;
    auto work = [handle] {
      handle->engine.reset();
      return Nothing{};
    };
    auto convert = [](Napi::Env env, Nothing&) { return env.Undefined(); };
    auto promise = AsyncTask<Nothing>{handle->queue, work, convert}.start(info.Env());
    handle->queue->thread().refuse_more();
    return promise;
  });
}

// microBatch(batch, lossDivisor, slot, onSlice?, isChecked, moreFollows): onSlice is called before
// the promise settles, once for each slice; the engine's thread never waits for it.
Napi::Value start_micro_batch(Info info, const Handle& handle) {
  OwnedBatch batch = token_batch(argument_object(info, 0));
  const double divisor = info[1].As<Napi::Number>().DoubleValue();
  ContributionTarget target(static_cast<int>(count_value(info[2], "slot")));
  target.is_checked = info[4].ToBoolean();
  target.more_follows = info[5].ToBoolean();
  std::function<void()> release = [] {};
  if (info[3].IsFunction()) {
    auto* on_slice = new Napi::FunctionReference(Napi::Persistent(info[3].As<Napi::Function>()));
    release = [on_slice] { delete on_slice; };
    target.on_slice = [handle, on_slice](const ContributionSlice& told) {
      handle->queue->call_js(
          [on_slice, told](Napi::Env env) { on_slice->Call({to_contribution_slice(env, told)}); });
    };
  }
  auto work = [handle, batch = std::move(batch), divisor, target] {
    if (!handle->engine) throw EngineError("ENGINE_FAILED", "the engine is closed.");
    return handle->engine->micro_batch(batch.view(), divisor, target);
  };
  return AsyncTask<MicroBatchResult>{handle->queue, work, to_micro_batch, release}.start(
      info.Env());
}

void add_step_methods(Napi::Object object, const Handle& handle) {
  set_method(object, "microBatch", [handle](Info info) { return start_micro_batch(info, handle); });
  set_method(object, "evaluate", [handle](Info info) {
    auto work = [batch = token_batch(argument_object(info, 0))](Engine& engine) {
      return engine.evaluate(batch.view());
    };
    return run_value<MicroBatchResult>(info, handle, std::make_pair(work, to_micro_batch));
  });
  set_method(object, "applyUpdate", [handle](Info info) {
    const Napi::Object from = argument_object(info, 1);
    AdamWNumbers numbers = {};
    numbers.learning_rate = static_cast<float>(number_field(from, "learningRate"));
    numbers.clip_factor = static_cast<float>(number_field(from, "clipFactor"));
    numbers.bias_correction1 = static_cast<float>(number_field(from, "biasCorrection1"));
    numbers.bias_correction2_sqrt = static_cast<float>(number_field(from, "biasCorrection2Sqrt"));
    const size_t step = count_value(info[0], "step");
    return run_void(info, handle,
                    [numbers, step](Engine& engine) { engine.apply_update(step, numbers); });
  });
  set_method(object, "fetchSum", [handle](Info info) {
    const size_t step = count_value(info[0], "step"), slice = count_value(info[1], "slice");
    return run_void(info, handle, [step, slice](Engine& engine) { engine.fetch_sum(step, slice); });
  });
  set_method(object, "logits", [handle](Info info) {
    auto work = [batch = token_batch(argument_object(info, 0))](Engine& engine) {
      return engine.logits(batch.view());
    };
    return run_value<std::vector<float>>(info, handle, std::make_pair(work, to_float32_array));
  });
  set_method(object, "gradients", [handle](Info info) {
    const double divisor = info[1].As<Napi::Number>().DoubleValue();
    auto work = [batch = token_batch(argument_object(info, 0)), divisor](Engine& engine) {
      return engine.gradients(batch.view(), divisor);
    };
    return run_value<std::vector<TensorValues>>(info, handle,
                                                std::make_pair(work, to_named_arrays));
  });
}

void add_file_methods(Napi::Object object, const Handle& handle) {
  set_method(object, "loadAdapter", [handle](Info info) {
    return run_void(info, handle, [folder = text_value(info[0], "folder")](Engine& engine) {
      engine.load_adapter(folder);
    });
  });
  set_method(object, "weightsDigest", [handle](Info info) {
    auto work = [](Engine& engine) { return engine.weights_digest(); };
    auto convert = [](Napi::Env env, std::string& digest) -> Napi::Value {
      return Napi::String::New(env, digest);
    };
    return run_value<std::string>(info, handle, std::make_pair(work, convert));
  });
  set_method(object, "weights", [handle](Info info) {
    auto work = [](Engine& engine) { return engine.weights(); };
    return run_value<std::vector<TensorValues>>(info, handle,
                                                std::make_pair(work, to_named_arrays));
  });
  set_method(object, "writeState", [handle](Info info) {
    const std::string path = text_value(info[0], "path");
    const size_t step = count_value(info[1], "step");
    return run_void(info, handle, [path, step](Engine& engine) { engine.write_state(path, step); });
  });
  set_method(object, "readState", [handle](Info info) {
    auto work = [path = text_value(info[0], "path")](Engine& engine) {
      return engine.read_state(path);
    };
    auto convert = [](Napi::Env env, size_t& step) -> Napi::Value {
      auto out = Napi::Object::New(env);
      out.Set("step", static_cast<double>(step));
      return out;
    };
    return run_value<size_t>(info, handle, std::make_pair(work, convert));
  });
  set_method(object, "writeAdapter", [handle](Info info) {
    const std::string folder = text_value(info[0], "folder");
    const std::string base = text_value(info[1], "baseModelName");
    return run_void(info, handle,
                    [folder, base](Engine& engine) { engine.write_adapter(folder, base); });
  });
  set_method(object, "weightChange", [handle](Info info) {
    auto work = [](Engine& engine) { return engine.weight_change(); };
    return run_value<std::vector<WeightChange>>(info, handle, std::make_pair(work, to_changes));
  });
}

// generate(options, onToken) -> { promise, abort() }
Napi::Value start_generation(Info info, const Handle& handle) {
  const GenerateOptions options = generate_options(argument_object(info, 0));
  auto is_aborted = std::make_shared<std::atomic<bool>>(false);
  // Released by the converter below, on the JavaScript thread, whatever happened.
  auto* on_token = new Napi::FunctionReference(Napi::Persistent(info[1].As<Napi::Function>()));
  auto release =
      std::shared_ptr<Napi::FunctionReference>(on_token, [](Napi::FunctionReference*) {});
  struct Outcome {
    GenerateResult result;
    std::optional<EngineError> failure;
  };
  auto work = [handle, options, is_aborted, on_token]() -> Outcome {
    const std::atomic<bool>* closing = &handle->queue->is_ending();
    GenerateHooks hooks;
    hooks.is_aborted = is_aborted.get();
    hooks.on_token = [&, closing](int32_t id) {
      if (*closing) *is_aborted = true;
      handle->queue->call_js(
          [on_token, id](Napi::Env env) { on_token->Call({Napi::Number::New(env, id)}); });
    };
    try {
      if (!handle->engine) throw EngineError("ENGINE_FAILED", "the engine is closed.");
      return {handle->engine->generate(options, hooks), {}};
    } catch (const EngineError& error) {
      return {{{}, "aborted"}, error};
    }
  };
  auto convert = [on_token](Napi::Env env, Outcome& outcome) -> Napi::Value {
    delete on_token;
    auto out = Napi::Object::New(env);
    if (outcome.failure) {
      out.Set("error", js_error(env, *outcome.failure).Value());
      return out;
    }
    auto ids = Napi::Array::New(env, outcome.result.ids.size());
    for (uint32_t i = 0; i < outcome.result.ids.size(); ++i) ids.Set(i, outcome.result.ids[i]);
    out.Set("ids", ids);
    out.Set("finishReason", outcome.result.finish_reason);
    return out;
  };
  auto out = Napi::Object::New(info.Env());
  out.Set("promise", AsyncTask<Outcome>{handle->queue, work, convert}.start(info.Env()));
  set_method(out, "abort", [is_aborted](Info abort_info) {
    *is_aborted = true;
    return abort_info.Env().Undefined();
  });
  return out;
}

Napi::Value create_engine(Info info) {
  auto handle = std::make_shared<EngineHandle>();
  const ChosenDevice chosen = chosen_device(argument_object(info, 0));
  EngineOptions options = engine_options(argument_object(info, 0));
  options.device = chosen.options;
  handle->engine = std::make_shared<Engine>(chosen.backend, std::move(options));
  handle->queue = std::make_shared<TaskQueue>(info.Env());
  auto object = Napi::Object::New(info.Env());
  const Device& device = handle->engine->device();
  object.Set("device", device.ops().describe(device.context()));
  object.Set("deviceClass", device_class(device));
  add_life_methods(object, handle);
  add_step_methods(object, handle);
  add_file_methods(object, handle);
  set_method(object, "generate", [handle](Info call) { return start_generation(call, handle); });
  return object;
}

}  // namespace

void register_engine(Napi::Env env, Napi::Object exports) {
  (void)env;
  set_method(exports, "createEngine", create_engine);
}

}  // namespace tunemesh
