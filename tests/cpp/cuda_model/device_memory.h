// Device memory for tests, as std::vector gives it, but with closed pages at both ends: a kernel's
// load or store outside ends the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_model {

// Which end of the memory lies exactly at a closed page; the few bytes left over at the other end
// are guarded against stores alone, and looked at when the memory is given back.
enum class Flush { end, start };

class DeviceBytes {
 public:
  // `size` bytes of poison whose address is `offset` above a multiple of 16; Flush::start takes
  // offset 0 only. With Flush::end, the end lies at the closed page when (offset + size) is a
  // multiple of 16.
  explicit DeviceBytes(size_t size, size_t offset = 0, Flush flush = Flush::end);
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes(DeviceBytes&& other) noexcept;
  ~DeviceBytes();

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void check_margins() const;
  unsigned char *pages_, *data_;
  size_t page_bytes_, size_;
};

// An array of T in device memory: poisoned, or a copy of host values.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count, size_t offset = 0, Flush flush = Flush::end)
      : bytes_(count * sizeof(T), offset * sizeof(T), flush), count_(count) {}
  explicit DeviceArray(const std::vector<T>& values, size_t offset = 0, Flush flush = Flush::end)
      : DeviceArray(values.size(), offset, flush) {
    for (size_t i = 0; i < count_; ++i) data()[i] = values[i];
  }

  T* data() const { return reinterpret_cast<T*>(bytes_.data()); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data()[i]; }

 private:
  DeviceBytes bytes_;
  size_t count_;
};

}  // namespace cuda_model
