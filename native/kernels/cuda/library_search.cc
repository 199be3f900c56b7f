#include "kernels/cuda/library_search.h"

#include <dlfcn.h>
#include <stdlib.h>

#include <algorithm>
#include <filesystem>
#include <system_error>

namespace tunemesh::cuda {
namespace {

constexpr const char* kPathVariable = "TUNEMESH_CUDA_LIBRARY_PATH";
constexpr int kMostLinks = 8;

// A list of unlike places: tries the names in each and remembers what was tried.
class Search {
 public:
  Search(const LibraryNames& names, const Surroundings& surroundings)
      : names_(names), surroundings_(surroundings) {}

  bool found() const { return result_.handle != nullptr; }

  void try_folder(const std::string& folder) {
    if (found() || std::find(folders_.begin(), folders_.end(), folder) != folders_.end()) return;
    folders_.push_back(folder);
    std::string outcome = surroundings_.exists(folder) ? "has neither name" : "no such folder";
    for (const char* soname : names_.sonames) {
      const std::string path = folder + "/" + soname;
      if (!surroundings_.exists(path)) continue;
      if (open(path, &outcome)) return;
    }
    note(folder + " (" + outcome + ")");
  }

  void try_loader() {
    for (const char* soname : names_.sonames) {
      std::string outcome;
      if (found() || open(soname, &outcome)) return;
      note("loader: " + outcome);
    }
  }

  void note(const std::string& line) {
    if (!found()) tried_.push_back(line);
  }

  LibrarySearchResult finish() {
    if (found()) return result_;
    std::string& error = result_.error;
    error = std::string(names_.title) + " not found (";
    for (size_t i = 0; i < names_.sonames.size(); ++i) {
      error += std::string(i == 0 ? "" : " or ") + names_.sonames[i];
    }
    error += "). Tried: ";
    for (size_t i = 0; i < tried_.size(); ++i) error += (i == 0 ? "" : "; ") + tried_[i];
    error += std::string(". Install it (pip install ") + names_.pip_package +
             ", or tunemesh doctor --install-libs DIR) or name its folder by " + kPathVariable +
             ".";
    return result_;
  }

 private:
  bool open(const std::string& path, std::string* outcome) {
    result_.handle = surroundings_.open(path, outcome);
    if (found()) result_.path = path;
    return found();
  }

  const LibraryNames& names_;
  const Surroundings& surroundings_;
  LibrarySearchResult result_;
  std::vector<std::string> folders_, tried_;
};

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(':', begin), list.size());
    if (end > begin) parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

void try_environment(Search& search, const Surroundings& s) {
  const std::string value = s.environment(kPathVariable);
  if (value.empty()) return search.note(std::string(kPathVariable) + " (not set)");
  for (const std::string& folder : split(value)) search.try_folder(folder);
}

void try_toolkits(Search& search, const Surroundings& s) {
  std::vector<std::string> roots;
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"}) {
    const std::string value = s.environment(variable);
    value.empty() ? search.note(std::string(variable) + " (not set)") : roots.push_back(value);
  }
  roots.push_back("/usr/local/cuda");
  for (const std::string& root : roots) {
    for (const char* below : {"/lib64", "/lib", "/targets/x86_64-linux/lib"}) {
      search.try_folder(root + below);
    }
  }
}

// Folders that may have lib/python3*/site-packages below them.
std::vector<std::string> python_prefixes(const Surroundings& s) {
  std::vector<std::string> prefixes;
  const auto add = [&](const std::string& prefix) {
    const bool is_new = std::find(prefixes.begin(), prefixes.end(), prefix) == prefixes.end();
    if (!prefix.empty() && is_new) prefixes.push_back(prefix);
  };
  add(s.environment("VIRTUAL_ENV"));
  add(s.environment("CONDA_PREFIX"));
  for (const std::string& folder : split(s.environment("PATH"))) {
    if (!s.exists(folder + "/python3")) continue;
    std::string program = folder + "/python3";
    for (int hop = 0; hop < kMostLinks && !program.empty(); ++hop) {
      const std::string bin = program.substr(0, program.rfind('/'));
      add(bin.substr(0, bin.rfind('/')));
      program = s.link(program);
    }
  }
  const std::string home = s.environment("HOME");
  if (!home.empty()) add(home + "/.local");
  add("/usr/local");
  add("/usr");
  return prefixes;
}

void try_pip(Search& search, const Surroundings& s) {
  for (const std::string& prefix : python_prefixes(s)) {
    const std::string lib = prefix + "/lib";
    bool has_nvidia = false;
    for (const std::string& python : s.entries(lib)) {
      if (python.rfind("python3", 0) != 0) continue;
      for (const char* packages : {"/site-packages", "/dist-packages"}) {
        const std::string nvidia = lib + "/" + python + packages + "/nvidia";
        for (const std::string& package : s.entries(nvidia)) {
          const std::string folder = nvidia + "/" + package + "/lib";
          if (!s.exists(folder)) continue;
          has_nvidia = true;
          search.try_folder(folder);
        }
      }
    }
    if (!has_nvidia) search.note(lib + "/python3*/site-packages/nvidia (no such folder)");
  }
}

}  // namespace

LibraryNames cublaslt_names() {
  return {"cuBLASLt", {"libcublasLt.so.13", "libcublasLt.so.12"}, "nvidia-cublas"};
}
LibraryNames cudnn_names() { return {"cuDNN", {"libcudnn.so.9"}, "nvidia-cudnn-cu13"}; }

LibrarySearchResult find_library(const LibraryNames& names, const std::string& option_folder,
                                 const Surroundings& surroundings) {
  Search search(names, surroundings);
  option_folder.empty() ? search.note("option (not given)") : search.try_folder(option_folder);
  try_environment(search, surroundings);
  search.try_loader();
  try_toolkits(search, surroundings);
  if (!search.found()) try_pip(search, surroundings);
  return search.finish();
}

Surroundings real_surroundings() {
  Surroundings s;
  s.environment = [](const char* name) {
    const char* value = getenv(name);
    return std::string(value != nullptr ? value : "");
  };
  s.open = [](const std::string& path, std::string* why) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const char* error = handle == nullptr ? dlerror() : nullptr;
    if (handle == nullptr) *why = error != nullptr ? error : "dlopen failed";
    return handle;
  };
  s.exists = [](const std::string& path) {
    std::error_code ignored;
    return std::filesystem::exists(path, ignored);
  };
  s.link = [](const std::string& path) {
    std::error_code failed;
    const std::filesystem::path target = std::filesystem::read_symlink(path, failed);
    if (failed) return std::string();
    const auto folder = std::filesystem::path(path).parent_path();
    return (folder / target).lexically_normal().string();
  };
  s.entries = [](const std::string& folder) {
    std::vector<std::string> names;
    std::error_code failed;
    std::filesystem::directory_iterator at(folder, failed), end;
    for (; !failed && at != end; at.increment(failed)) {
      names.push_back(at->path().filename().string());
    }
    std::sort(names.begin(), names.end());
    return names;
  };
  return s;
}

}  // namespace tunemesh::cuda
