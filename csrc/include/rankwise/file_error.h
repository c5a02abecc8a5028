// FileError: the one exception type of the file layer.
#pragma once

#include <stdexcept>

namespace rankwise::io {

/// A file or folder could not be read or written; what() names the path, what was wanted and what
/// was found.
class FileError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace rankwise::io
