// A whole file mapped read-only; pages are shared by every process that maps
// it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace tunemesh {

class MappedFile {
 public:
  // `code` is thrown where the file can't be opened or read.
  MappedFile(const std::string& path, const std::string& code);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  MappedFile& operator=(MappedFile&&) = delete;

  const std::string& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Gives the resident pages back: what was read once must not count as a worker's memory.
  void forget(size_t offset, size_t size) const;

 private:
  std::string path_;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// A file written under a temporary name beside `path`, and renamed to it by
// commit(), after fsync. Without commit() nothing is left. Throws DISK_FULL
// where the disk is, otherwise ENGINE_FAILED.
class FileWriter {
 public:
  explicit FileWriter(const std::string& path);
  ~FileWriter();
  FileWriter(const FileWriter&) = delete;
  FileWriter& operator=(const FileWriter&) = delete;

  void write(const void* data, size_t size);
  size_t written() const { return written_; }
  void commit();

 private:
  [[noreturn]] void fail(const char* what) const;

  std::string path_;
  std::string temporary_path_;
  int descriptor_ = -1;
  size_t written_ = 0;
};

}  // namespace tunemesh
