// Where the CUDA plugin looks for cuBLASLt and cuDNN: the order of places on a made-up machine, and
// the error that lists them. Needs no GPU.
#include <stdio.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "kernels/cuda/library_search.h"
#include "test_check.h"

namespace tunemesh::cuda {
namespace {

using test::record;

// A machine of names: `files` can be opened unless they are `broken`.
struct Machine {
  std::map<std::string, std::string> variables, links;
  std::set<std::string> files, broken, loader_names;
  mutable std::vector<std::string> opened;

  bool exists(const std::string& path) const {
    const auto at = files.lower_bound(path);
    return at != files.end() && (*at == path || at->rfind(path + "/", 0) == 0);
  }
  std::vector<std::string> entries(const std::string& folder) const {
    std::set<std::string> names;
    const std::string prefix = folder + "/";
    for (const std::string& file : files) {
      if (file.rfind(prefix, 0) != 0) continue;
      names.insert(file.substr(prefix.size(), file.find('/', prefix.size()) - prefix.size()));
    }
    return {names.begin(), names.end()};
  }
  void* open(const std::string& path, std::string* why) const {
    opened.push_back(path);
    const bool is_name = path.find('/') == std::string::npos;
    const bool is_there = is_name ? loader_names.count(path) > 0 : files.count(path) > 0;
    if (is_there && broken.count(path) == 0) return const_cast<Machine*>(this);
    *why = path + ": cannot open shared object file";
    return nullptr;
  }
  Surroundings surroundings() const {
    Surroundings s;
    s.environment = [this](const char* name) {
      const auto at = variables.find(name);
      return at == variables.end() ? std::string() : at->second;
    };
    s.open = [this](const std::string& path, std::string* why) { return open(path, why); };
    s.exists = [this](const std::string& path) { return exists(path); };
    s.entries = [this](const std::string& folder) { return entries(folder); };
    s.link = [this](const std::string& path) {
      const auto at = links.find(path);
      return at == links.end() ? std::string() : at->second;
    };
    return s;
  }
  LibrarySearchResult find(const std::string& option = "") const {
    return find_library(cublaslt_names(), option, surroundings());
  }
};

// One place of each kind, best first.
struct Place {
  const char* name;
  std::string path;
};
const std::vector<Place> kPlaces = {
    {"option", "/chosen/libcublasLt.so.13"},
    {"environment, first folder", "/env1/libcublasLt.so.12"},
    {"environment, second folder", "/env2/libcublasLt.so.13"},
    {"loader", "libcublasLt.so.13"},
    {"loader, older name", "libcublasLt.so.12"},
    {"CUDA_HOME/lib64", "/toolkit/lib64/libcublasLt.so.13"},
    {"CUDA_PATH/lib", "/other/lib/libcublasLt.so.13"},
    {"/usr/local/cuda", "/usr/local/cuda/lib64/libcublasLt.so.13"},
    {"VIRTUAL_ENV", "/venv/lib/python3.12/site-packages/nvidia/cu13/lib/libcublasLt.so.13"},
    {"older pip layout", "/venv/lib/python3.12/site-packages/nvidia/cublas/lib/libcublasLt.so.12"},
    {"python3 on PATH", "/opt/py/lib/python3.11/site-packages/nvidia/cublas/lib/libcublasLt.so.12"},
    {"what python3 links to",
     "/real/lib/python3.13/site-packages/nvidia/cu13/lib/libcublasLt.so.13"},
    {"home", "/home/a/.local/lib/python3.9/site-packages/nvidia/cublas/lib/libcublasLt.so.12"},
    {"system", "/usr/lib/python3/dist-packages/nvidia/cublas/lib/libcublasLt.so.12"},
};

Machine full_machine() {
  Machine machine;
  machine.variables = {{"TUNEMESH_CUDA_LIBRARY_PATH", "/env1::/env2"},
                       {"CUDA_HOME", "/toolkit"},
                       {"CUDA_PATH", "/other"},
                       {"VIRTUAL_ENV", "/venv"},
                       {"PATH", "/bin:/opt/py/bin"},
                       {"HOME", "/home/a"}};
  machine.files.insert("/opt/py/bin/python3");
  machine.links = {{"/opt/py/bin/python3", "/real/bin/python3"},
                   {"/real/bin/python3", "/real/bin/python3"}};
  for (const Place& place : kPlaces) {
    (place.path[0] == '/' ? machine.files : machine.loader_names).insert(place.path);
  }
  return machine;
}

// Taking away what was found, the search must go through the list in order.
void test_order() {
  Machine machine = full_machine();
  for (const Place& place : kPlaces) {
    const LibrarySearchResult result = machine.find("/chosen");
    CHECK(result.handle == &machine && result.path == place.path,
          std::string("found by ") + place.name + ": " + result.path + result.error);
    machine.files.erase(place.path);
    machine.loader_names.erase(place.path);
  }
  CHECK(machine.find("/chosen").handle == nullptr, "nothing is left to find");
}

void test_newest_name_first() {
  Machine machine;
  machine.files = {"/chosen/libcublasLt.so.12", "/chosen/libcublasLt.so.13"};
  CHECK(machine.find("/chosen").path == "/chosen/libcublasLt.so.13", "13 comes before 12");
  machine.broken = {"/chosen/libcublasLt.so.13"};
  CHECK(machine.find("/chosen").path == "/chosen/libcublasLt.so.12",
        "a file that does not load is passed over");
}

void test_error_lists_places() {
  Machine machine = full_machine();
  for (const Place& place : kPlaces) machine.files.erase(place.path);
  machine.loader_names.clear();
  machine.files.insert("/env2/libcublasLt.so.13");
  machine.broken = {"/env2/libcublasLt.so.13"};
  const std::string error = machine.find("/chosen").error;
  for (const char* part : {
           "cuBLASLt not found (libcublasLt.so.13 or libcublasLt.so.12)",
           "/chosen (no such folder)",
           "/env1 (no such folder)",
           "/env2 (/env2/libcublasLt.so.13: cannot open shared object file)",
           "loader: libcublasLt.so.13: cannot open",
           "loader: libcublasLt.so.12: cannot open",
           "/toolkit/lib64 (no such folder)",
           "/other/targets/x86_64-linux/lib (no such folder)",
           "/usr/local/cuda/lib (no such folder)",
           "/venv/lib/python3*/site-packages/nvidia (no such folder)",
           "/opt/py/lib/python3*/site-packages/nvidia (no such folder)",
           "/home/a/.local/lib/python3*/site-packages/nvidia (no such folder)",
           "pip install nvidia-cublas",
           "TUNEMESH_CUDA_LIBRARY_PATH",
       }) {
    CHECK(error.find(part) != std::string::npos, std::string("the error names ") + part);
  }
  CHECK(std::count(machine.opened.begin(), machine.opened.end(), "/env2/libcublasLt.so.13") == 1,
        "each file is tried once");
}

void test_bare_machine() {
  const Machine machine;
  const LibrarySearchResult cudnn = find_library(cudnn_names(), "", machine.surroundings());
  for (const char* part : {"cuDNN not found (libcudnn.so.9)", "option (not given)",
                           "TUNEMESH_CUDA_LIBRARY_PATH (not set)", "CUDA_HOME (not set)",
                           "pip install nvidia-cudnn-cu13"}) {
    CHECK(cudnn.error.find(part) != std::string::npos, std::string("a bare machine: ") + part);
  }
}

// The real loader finds this program's own C library, and says why it does not find another.
void test_real_loader() {
  const Surroundings real = real_surroundings();
  std::string why;
  CHECK(real.open("libc.so.6", &why) != nullptr, "the loader opens libc.so.6: " + why);
  CHECK(real.open("libtunemesh-none.so.1", &why) == nullptr &&
            why.find("libtunemesh-none.so.1") != std::string::npos,
        "the loader's own words: " + why);
  CHECK(real.entries("/no/such/folder").empty(), "a folder that is not there has no entries");
}

}  // namespace
}  // namespace tunemesh::cuda

int main() {
  using namespace tunemesh::cuda;
  test_order();
  test_newest_name_first();
  test_error_lists_places();
  test_bare_machine();
  test_real_loader();
  return tunemesh::test::finish("cuda_library_search_test");
}
