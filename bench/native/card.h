// What a GPU's plugin tells benchmarks beside its table (kernels/cuda/plugin.h): the device's clock
// and memory. On the CPU there is none of it.
#pragma once
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <optional>
#include <string>

#include "engine/backend_plugin.h"

namespace tunemesh::bench {

struct CardOverhead {
  size_t total_bytes = 0, workspace_bytes = 0;
};

struct CardFunctions {
  int (*mark)(TmContext*, size_t) = nullptr;
  double (*marked_ms)(TmContext*, size_t, size_t) = nullptr;
  CardOverhead (*overhead)(TmContext*) = nullptr;

  bool has_clock() const { return mark != nullptr && marked_ms != nullptr; }
};

inline CardFunctions card_functions(const std::string& device, const std::string& plugin_path) {
  CardFunctions card;
  if (device == "cpu") return card;
  const auto find = [&](const char* name, auto& function) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(plugin_symbol(plugin_path, name));
  };
  find("tm_cuda_mark", card.mark);
  find("tm_cuda_marked_ms", card.marked_ms);
  find("tm_cuda_overhead", card.overhead);
  return card;
}

// Another process that has a context on the card and tells what the driver says is free: so the
// benchmark's own context counts too, which it cannot see itself. Made before this process touches
// the card; ends with it.
class CardWatch {
 public:
  CardWatch(const std::string& device, const std::string& plugin_path) {
    signal(SIGPIPE, SIG_IGN);  // a watch that has ended tells nothing, and ends nobody
    if (device == "cpu" || pipe(questions_) != 0 || pipe(answers_) != 0) return;
    child_ = fork();
    if (child_ == 0) answer(plugin_path);
    close(questions_[0]);
    close(answers_[1]);
    idle_free_bytes_ = ask();
  }
  ~CardWatch() {
    if (child_ <= 0) return;
    close(questions_[1]);
    close(answers_[0]);
    waitpid(child_, nullptr, 0);
  }
  CardWatch(const CardWatch&) = delete;
  CardWatch& operator=(const CardWatch&) = delete;

  // Above the idle card; nothing where the driver does not tell.
  std::optional<size_t> used_bytes() {
    const size_t free_bytes = child_ > 0 ? ask() : 0;
    if (free_bytes == 0 || idle_free_bytes_ < free_bytes) return std::nullopt;
    return idle_free_bytes_ - free_bytes;
  }

 private:
  size_t ask() {
    const char question = '?';
    size_t free_bytes = 0;
    if (write(questions_[1], &question, 1) != 1) return 0;
    return read(answers_[0], &free_bytes, sizeof free_bytes) == sizeof free_bytes ? free_bytes : 0;
  }
  [[noreturn]] void answer(const std::string& plugin_path) {
    close(questions_[1]);
    close(answers_[0]);
    const auto free_bytes =
        reinterpret_cast<size_t (*)(int)>(plugin_symbol(plugin_path, "tm_cuda_free_bytes"));
    for (char question; read(questions_[0], &question, 1) == 1;) {
      const size_t told = free_bytes != nullptr ? free_bytes(0) : 0;
      if (write(answers_[1], &told, sizeof told) != sizeof told) break;
    }
    _exit(0);
  }

  int questions_[2] = {-1, -1}, answers_[2] = {-1, -1};
  pid_t child_ = -1;
  size_t idle_free_bytes_ = 0;
};

}  // namespace tunemesh::bench
