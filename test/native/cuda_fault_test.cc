// A card that fails, on a card: the error is told by a later call, in a checked context by the
// operation and kernel that caused it, and it stays with the context. Each case is a process of its
// own, because the error also stays with that.
//
//   cuda_fault_test [tunemesh_cuda.so] [--provoke]   without a card it says that it skips
//
// --provoke: one error in this process, for a sanitizer to see.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "engine/backend_plugin.h"
#include "kernels/backend.h"
#include "test_check.h"

namespace tunemesh::test {
namespace {

constexpr int kSkipped = 77;

struct Opened {
  const TmBackend* ops;
  TmContext* context = nullptr;

  TmStatus add(void* y, void* x, size_t count) const {
    return ops->add(context, static_cast<TmElement*>(y), static_cast<const TmElement*>(x), count);
  }
  std::string line() const { return ops->last_error(); }
};

Opened open_card(const std::string& plugin, bool is_checked) {
  Opened card = {find_backend("cuda", plugin)};
  if (card.ops->num_devices() == 0) _exit(kSkipped);
  TmContextOptions options = {};
  options.size = sizeof options;
  options.precision = TM_BF16;
  CHECK(card.ops->create(&options, &card.context) == TM_OK, "no context: " + card.line());
  CHECK(card.ops->set_checked(card.context, is_checked ? 1 : 0) == TM_OK, "not checked");
  return card;
}

// No memory of any kind lies there.
void* const kNowhere = reinterpret_cast<void*>(uintptr_t{1} << 20);
constexpr size_t kCount = 4096;

void test_late(const std::string& plugin) {
  const Opened card = open_card(plugin, false);
  CHECK(card.add(kNowhere, kNowhere, kCount) == TM_OK, "an unchecked launch waits");
  CHECK(card.ops->synchronize(card.context) == TM_DEVICE_ERROR, "the error is lost");
  void* memory = nullptr;
  CHECK(card.ops->allocate(card.context, 64, &memory) == TM_DEVICE_ERROR, "the context goes on");
}

void test_checked(const std::string& plugin) {
  const Opened card = open_card(plugin, true);
  CHECK(card.add(kNowhere, kNowhere, kCount) == TM_DEVICE_ERROR, "the operation does not tell");
  CHECK(card.line().find("add") != std::string::npos, "no kernel is named: " + card.line());
  CHECK(card.ops->synchronize(card.context) == TM_DEVICE_ERROR, "the context goes on");
}

// Checked or not: the same bits, and a context may be checked for a while.
void test_same_bits(const std::string& plugin) {
  const Opened card = open_card(plugin, false);
  std::vector<uint16_t> host(kCount), free(kCount), checked(kCount);
  for (size_t i = 0; i < kCount; ++i) host[i] = static_cast<uint16_t>(0x3f80 + i % 97);
  void *y = nullptr, *x = nullptr;
  const size_t bytes = kCount * sizeof(uint16_t);
  CHECK(card.ops->allocate(card.context, bytes, &y) == TM_OK, card.line());
  CHECK(card.ops->allocate(card.context, bytes, &x) == TM_OK, card.line());
  for (std::vector<uint16_t>* out : {&free, &checked}) {
    card.ops->set_checked(card.context, out == &checked ? 1 : 0);
    CHECK(card.ops->copy_in(card.context, y, host.data(), bytes) == TM_OK, card.line());
    CHECK(card.ops->copy_in(card.context, x, host.data(), bytes) == TM_OK, card.line());
    CHECK(card.add(y, x, kCount) == TM_OK, card.line());
    CHECK(card.ops->copy_out(card.context, out->data(), y, bytes) == TM_OK, card.line());
  }
  CHECK(free == checked && free != host, "checking changes bits");
}

// The process's exit status, in which CUDA has never been used before.
int in_process(void (*test)(const std::string&), const std::string& plugin) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    test(plugin);
    std::fflush(stdout);
    _exit(num_failures == 0 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

int skip(const std::string& reason) {
  std::printf("skipped: no CUDA %s\ncuda_fault_test: 0 passed, 0 failed, 1 skipped\n",
              reason.c_str());
  return 0;
}

}  // namespace
}  // namespace tunemesh::test

int main(int argc, char** argv) {
  using namespace tunemesh::test;
  const std::string plugin = argc > 1 ? argv[1] : "build/native/tunemesh_cuda.so";
  if (access(plugin.c_str(), R_OK) != 0) return skip("plugin at " + plugin);
  if (argc > 2 && std::string(argv[2]) == "--provoke") {
    if (tunemesh::find_backend("cuda", plugin)->num_devices() == 0) return skip("device");
    test_late(plugin);
    return finish("cuda_fault_test");
  }
  for (const auto test : {test_late, test_checked, test_same_bits}) {
    const int status = in_process(test, plugin);
    if (status == kSkipped) return skip("device");
    CHECK(status == 0, "a case failed; its words are above");
  }
  return finish("cuda_fault_test");
}
