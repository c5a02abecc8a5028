// Fuzzes the journal of an interrupted save.
#include "io/save_journal.h"

#include <rankwise/file_error.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "check.h"

namespace {

using namespace rankwise::io;

std::optional<std::vector<JournalEntry>> parsed(std::string_view text) {
  try {
    return parse_journal(text, "F");
  } catch (const FileError& error) {
    check(std::string_view(error.what()).starts_with("F: "), "an error names its file");
    return std::nullopt;
  }
}

bool same(const JournalEntry& a, const JournalEntry& b) {
  return a.name == b.name && a.written == b.written && a.replaced == b.replaced;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto entries = parsed({reinterpret_cast<const char*>(data), size});
  if (!entries) return 0;
  for (const JournalEntry& entry : *entries) {
    check(!entry.name.empty() && entry.name.find('/') == std::string::npos,
          "names are of files in the folder");
  }
  const auto again = parsed(format_journal(*entries));
  check(again && std::equal(again->begin(), again->end(), entries->begin(), entries->end(), same),
        "what is written is read");
  return 0;
}
