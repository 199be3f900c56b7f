#include "engine/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "engine/error.h"

namespace tunemesh {

MappedFile::MappedFile(const std::string& path, const std::string& code) : path_(path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    throw EngineError(errno == ENOENT ? "MODEL_NOT_FOUND" : code,
                      path + " can't be opened: " + std::strerror(errno) + ".");
  }
  struct stat facts = {};
  const bool known = ::fstat(descriptor, &facts) == 0 && S_ISREG(facts.st_mode);
  if (known && facts.st_size > 0) {
    size_ = static_cast<size_t>(facts.st_size);
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0);
    if (mapped != MAP_FAILED) data_ = static_cast<const uint8_t*>(mapped);
  }
  ::close(descriptor);
  if (data_ == nullptr) {
    throw EngineError(code, path + (known ? " is empty or can't be mapped." : " is not a file."));
  }
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

void MappedFile::forget(size_t offset, size_t size) const {
  const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
  const size_t first = (offset + page - 1) / page * page;
  const size_t last = std::min(offset + size, size_) / page * page;
  if (first < last) ::madvise(const_cast<uint8_t*>(data_) + first, last - first, MADV_DONTNEED);
}

FileWriter::FileWriter(const std::string& path) : path_(path) {
  static std::atomic<unsigned> counter{0};
  temporary_path_ = path + ".tmp-" + std::to_string(::getpid()) + "-" + std::to_string(counter++);
  descriptor_ = ::open(temporary_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor_ < 0) fail("can't be created");
}

FileWriter::~FileWriter() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_path_.c_str());
}

void FileWriter::write(const void* data, size_t size) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  while (size > 0) {
    const ssize_t done = ::write(descriptor_, bytes, std::min(size, size_t{1} << 30));
    if (done < 0) {
      if (errno == EINTR) continue;
      fail("can't be written");
    }
    bytes += done;
    size -= static_cast<size_t>(done);
    written_ += static_cast<size_t>(done);
  }
}

void FileWriter::commit() {
  if (::fsync(descriptor_) != 0) fail("can't be made durable");
  ::close(std::exchange(descriptor_, -1));
  if (::rename(temporary_path_.c_str(), path_.c_str()) != 0) {
    const int reason = errno;
    ::unlink(temporary_path_.c_str());
    errno = reason;
    fail("can't be renamed into place");
  }
}

void FileWriter::fail(const char* what) const {
  const bool full = errno == ENOSPC || errno == EDQUOT;
  throw EngineError(full ? "DISK_FULL" : "ENGINE_FAILED",
                    path_ + " " + what + ": " + std::strerror(errno) + ".");
}

}  // namespace tunemesh
